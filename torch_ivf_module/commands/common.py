"""What the commands share: arguments, files to read and to write, and how they talk to a person or a program."""

from __future__ import annotations

import argparse
import functools
import json
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, TypeVar

import torch

from .. import faiss_bridge
from .._files import replace
from .._optional import require
from ..checkpoint import AnyIndex, load

__all__ = [
    "INDEX_FILES",
    "VECTOR_FILES",
    "Reporter",
    "add_json",
    "index_writer",
    "load_trained",
    "positive",
    "read_bytes",
    "say",
    "shown_bytes",
    "usable_device",
]

Item = TypeVar("Item")
FAISS = (".faiss", ".faissindex", ".index")
VECTOR_FILES = ".npy, .npz, .pt, .safetensors, .fvecs, .bvecs, .fbin, .u8bin, .i8bin, .hdf5 or .parquet"
INDEX_FILES = f".pt, .pth or .safetensors, or for faiss {', '.join(FAISS[:-1])} or {FAISS[-1]}"
_UNITS = ("B", "KiB", "MiB", "GiB", "TiB")


class Reporter:
    """Lines for a person, or with --json one object for a program; progress goes to stderr either way."""

    def __init__(self, args: argparse.Namespace) -> None:
        self._json: bool = args.json

    def say(self, what: str, text: str, seconds: float | None = None) -> None:
        """A step that is done, for a person."""
        if not self._json:
            say(what, text, seconds)

    def progress(self, items: Iterable[Item], title: str, **settings: Any) -> Iterable[Item]:
        """`items` with a bar on a terminal, that is gone when they are (extra `cli`)."""
        bar: Iterable[Item] = require("tqdm", "cli").tqdm(items, desc=title, leave=False, disable=None, **settings)
        return bar

    def result(self, facts: dict[str, Any], text: str = "") -> None:
        """What the command found: `facts` for a program, `text` for a person."""
        if self._json:
            print(json.dumps(facts, indent=1), flush=True)
        elif text:
            print(text, flush=True)


def say(what: str, text: str, seconds: float | None = None) -> None:
    """A line about a step."""
    ending = "" if seconds is None else f"  ({seconds:.1f} s)"
    print(f"{what:<8}{text}{ending}", flush=True)


def add_json(parser: argparse.ArgumentParser) -> None:
    """Declare --json."""
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of text")


def load_trained(path: Path, *, device: torch.device | None = None, mmap: bool = False) -> AnyIndex:
    """`load`, but for an index that cannot be searched yet: ValueError."""
    index = load(path, device=device, mmap=mmap)
    if not index.is_trained:
        raise ValueError(f"{path} contains an index that is not trained, so there is nothing to search")
    return index


def index_writer(path: Path) -> Callable[[AnyIndex], None]:
    """What writes an index to `path` as its suffix says. ValueError for another suffix, ImportError naming an extra."""
    kind = path.suffix.lower()
    if kind in FAISS:
        faiss = require("faiss", "faiss")
        return lambda index: replace(path, functools.partial(faiss.write_index, faiss_bridge.to_faiss(index)))
    if kind not in (".pt", ".pth", ".safetensors"):
        raise ValueError(f"{path} must end in {INDEX_FILES}")
    if kind == ".safetensors":
        require("safetensors.torch", "safetensors")
    return lambda index: index.save(path)


def positive(text: str) -> int:
    """An int of at least 1."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be >= 1, got {value}")
    return value


def usable_device(text: str) -> torch.device:
    """A device that tensors can be made on here."""
    try:
        return torch.empty(0, device=text).device
    except (AssertionError, NotImplementedError, RuntimeError) as error:
        raise argparse.ArgumentTypeError(f"{text!r} cannot be used here: {str(error).splitlines()[0]}") from error


def read_bytes(text: str) -> int:
    """A number of bytes such as 500M, 2G, 1.5GiB or 1000; units are powers of 1024.

    >>> read_bytes("2K")
    2048
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?)(?:i?B)?", text.strip(), re.IGNORECASE)
    if match is None:
        raise argparse.ArgumentTypeError(f"must be a size such as 500M or 2G, got {text!r}")
    return int(float(match[1]) * 1024 ** " KMGT".index(match[2].upper() or " "))


def shown_bytes(count: float) -> str:
    """Bytes as people read them.

    >>> shown_bytes(3 << 20)
    '3.0 MiB'
    """
    unit = 0
    while count >= 1024 and unit < len(_UNITS) - 1:
        count, unit = count / 1024, unit + 1
    return f"{count:,.{1 if unit else 0}f} {_UNITS[unit]}"
