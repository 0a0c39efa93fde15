"""One index in one file: written whole or not at all, opened without executing anything."""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ._files import replace
from ._optional import require
from .index import IndexFlat, IndexFlatIP, IndexFlatL2, IndexIVFFlat
from .index.base import IndexBase

FORMAT = "torch_ivf_module"
VERSION = 1
CLASSES: dict[str, type[IndexBase]] = {c.__name__: c for c in (IndexFlat, IndexFlatL2, IndexFlatIP, IndexIVFFlat)}


class BadFile(ValueError):
    """The file is no index, or is damaged; the text says why."""


def save(index: IndexBase, path: str | os.PathLike[str]) -> None:
    """Write `index` to `path`; see `IndexBase.save`."""
    path = Path(path)
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in index.state_dict().items()}
    about: dict[str, Any] = {"format": FORMAT, "version": VERSION, "class": type(index).__name__}
    about.update(config=index.config(), digests={name: _digest(tensor) for name, tensor in tensors.items()})
    about["digest"] = _digest_of(about)
    if about["class"] not in CLASSES:
        raise TypeError(f"index must be one of {', '.join(CLASSES)}, got {about['class']}")
    if path.suffix == ".safetensors":
        library = require("safetensors.torch", "safetensors")
        words = {key: json.dumps(value) for key, value in about.items()}
        replace(path, lambda part: library.save_file(tensors, part, metadata=words))
    else:
        replace(path, lambda part: torch.save({**about, "state": tensors}, part))


def load(path: str | os.PathLike[str], *, device: torch.device | str | None = None, mmap: bool = False) -> IndexBase:
    """Open an index saved by `save`, of the class the file names.

    Checksums tell an altered file. `mmap=True` maps the vectors instead of reading them, so theirs is not looked
    at. Nothing in the file is executed. Raises `BadFile` (a ValueError) for a file that is damaged, foreign or from
    a newer release, FileNotFoundError if there is none.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     IndexFlatL2(4).save(f"{folder}/index.pt")
    ...     load(f"{folder}/index.pt").d
    4
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no such file: {path}")
    try:
        read = _read_safetensors if path.suffix == ".safetensors" else _read_torch
        about, tensors = read(path, mmap)
    except (ImportError, MemoryError):
        raise
    except Exception as error:  # the readers raise a dozen kinds for damage, all of them meaning the same here
        raise BadFile(f"{path} cannot be read as an index: {error}") from error
    index = _rebuild(path, about, tensors, unread=("packed_embeddings",) if mmap else ())
    return index if device is None else index.to(device)


def _rebuild(path: Path, about: Mapping[str, Any], tensors: dict[str, Tensor], unread: tuple[str, ...]) -> IndexBase:
    if about.get("format") != FORMAT:
        raise BadFile(f"{path} was not written by torch_ivf_module")
    version = about.get("version")
    if not isinstance(version, int) or version > VERSION:
        raise BadFile(f"{path} has format version {version}, this release reads up to {VERSION}")
    if about.get("class") not in CLASSES:
        raise BadFile(f"{path} holds a {about.get('class')!r}, this release knows {', '.join(CLASSES)}")
    digests = about.get("digests")
    if about.get("digest") != _digest_of(about) or not isinstance(digests, dict) or set(digests) != set(tensors):
        raise BadFile(f"{path} is damaged: its description does not match its checksum")
    for name, tensor in tensors.items():
        if name not in unread and digests[name] != _digest(tensor):
            raise BadFile(f"{path} is damaged: {name} does not match its checksum")
    try:
        config = dict(about["config"])
        config["dtype"] = getattr(torch, config["dtype"])
        kind = CLASSES[about["class"]]
        if kind in (IndexFlatL2, IndexFlatIP):
            del config["metric"]
        index = kind(**config, device="meta")
        index.load_state_dict(tensors, assign=True)
    except (KeyError, TypeError, ValueError, AttributeError, RuntimeError) as error:
        raise BadFile(f"{path} holds no sound index: {error}") from error
    return index


def _read_torch(path: Path, mmap: bool) -> tuple[Mapping[str, Any], dict[str, Tensor]]:
    about = torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
    if not isinstance(about, dict) or not isinstance(about.get("state"), dict):
        raise ValueError("it holds no index")
    return about, about["state"]


def _read_safetensors(path: Path, mmap: bool) -> tuple[Mapping[str, Any], dict[str, Tensor]]:
    library = require("safetensors", "safetensors")
    with library.safe_open(path, framework="pt") as file:
        about = {key: json.loads(value) for key, value in (file.metadata() or {}).items() if key != "format"}
        about["format"] = json.loads((file.metadata() or {}).get("format", "null"))
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
    return about, tensors if mmap else {name: tensor.clone() for name, tensor in tensors.items()}


def _digest(tensor: Tensor) -> int:
    """CRC-32 of a tensor's bytes."""
    return zlib.crc32(tensor.contiguous().flatten().view(torch.uint8).numpy().data)


def _digest_of(about: Mapping[str, Any]) -> int:
    """CRC-32 of what a file says of itself."""
    said = {key: about.get(key) for key in ("format", "version", "class", "config", "digests")}
    return zlib.crc32(json.dumps(said, sort_keys=True).encode())
