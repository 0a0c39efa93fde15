"""Indexes in folders and repositories of the Hugging Face Hub, through huggingface_hub's own mixin."""

from __future__ import annotations

import functools
import json
import os
from pathlib import Path
from typing import Any

from ._files import replace
from ._optional import require
from .checkpoint import AnyIndex, BadFile, description, load, save
from .index import IndexPreTransform

__all__ = ["from_pretrained", "push_to_hub", "save_pretrained"]

WEIGHTS, CONFIG = "model.safetensors", "config.json"
_CARD: dict[str, Any] = {"library_name": "torch_ivf_module", "tags": ["vector-search"]}
# Settings where config.json overrules the file.
FREE = ("nprobe", "max_codes", "k", "search_mode", "max_bytes", "codes", "auto_rebalance")


def save_pretrained(index: AnyIndex, folder: str | os.PathLike[str], **settings: Any) -> Any:
    """Write `index` to a folder: config.json, model.safetensors (which `load` can open) and a model card.

    `settings` are arguments of huggingface_hub's `save_pretrained`, such as push_to_hub and repo_id.

    >>> import tempfile
    >>> from torch_ivf_module import IndexFlatL2
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     save_pretrained(IndexFlatL2(2), folder)
    ...     from_pretrained(folder).d
    2
    """
    return _shelf()(index).save_pretrained(folder, **settings)


def push_to_hub(index: AnyIndex, repo_id: str, **settings: Any) -> Any:
    """Upload `index` to a repository of the Hub; `settings` are arguments of huggingface_hub's `push_to_hub`."""
    return _shelf()(index).push_to_hub(repo_id, **settings)


def from_pretrained(name: str | os.PathLike[str], *, device: Any = None, mmap: bool = False, **settings: Any) -> Any:
    """Open the index in a local folder or in a repository of the Hub.

    `settings` are arguments of huggingface_hub's `from_pretrained`, such as revision, token and cache_dir. Settings of
    a search, such as nprobe and k, are those in config.json. Settings in config.json that contradict the buffers are
    refused. Raises BadFile (a ValueError) for these and for a damaged file, FileNotFoundError if a file is missing.
    """
    try:
        return _shelf().from_pretrained(name, device=device, mmap=mmap, **settings).index
    except (json.JSONDecodeError, UnicodeDecodeError, AttributeError) as error:  # the last one for JSON of another kind
        raise BadFile(f"{CONFIG} of {name} cannot be read: {error}") from error


@functools.cache
def _shelf() -> Any:
    """A class that gives an index huggingface_hub's methods; made here, where that package is certain to be wanted."""
    library = require("huggingface_hub", "hub")

    class HubAdapter(library.PyTorchModelHubMixin, **_CARD):  # type: ignore
        def __init__(self, index: AnyIndex) -> None:
            self.index = index

        def _save_pretrained(self, folder: Path) -> None:
            words = json.dumps(description(self.index), indent=2) + "\n"
            save(self.index, folder / WEIGHTS)
            replace(folder / CONFIG, functools.partial(_write, words))

        @classmethod
        def _from_pretrained(
            cls, *, model_id: str, device: Any, mmap: bool, config: Any = None, **where: Any
        ) -> HubAdapter:
            path = Path(model_id, WEIGHTS)
            if not path.parent.is_dir():
                path = Path(library.hf_hub_download(repo_id=model_id, filename=WEIGHTS, **where))
            index = load(path, device=device, mmap=mmap)
            if config is None:
                raise BadFile(f"{path.parent} has no {CONFIG}")
            _agree(index, config, path)
            return cls(index)

    return HubAdapter


def _write(words: str, path: str) -> None:
    Path(path).write_text(words, encoding="utf-8")


def _agree(index: AnyIndex, config: Any, path: Path) -> None:
    """Hold config.json against the index beside it, and take from it what may be set freely."""
    found = description(index)
    if not isinstance(config, dict) or config.get("class") != found["class"]:
        raise BadFile(f"{CONFIG} next to {path} must describe an {found['class']}, which is what the file contains")
    own, told = found["config"], config.get("config")
    if not isinstance(told, dict):
        raise BadFile(f"{CONFIG} next to {path} must have an object named config with the settings, got {told!r}")
    for name in {*own, *told}:
        if name == "index" and isinstance(index, IndexPreTransform):
            _agree(index.index, told.get(name), path)
        elif name in FREE and name in own:
            if name in told:  # else it was written by a release without this setting
                _set(index, name, told[name], path)
        elif own.get(name) != told.get(name):
            raise BadFile(f"{CONFIG} says {name} = {told.get(name)!r}, but {path} has {own.get(name)!r}")


def _set(index: AnyIndex, name: str, value: Any, path: Path) -> None:
    try:
        setattr(index, name, value)
    except (TypeError, ValueError) as error:
        raise BadFile(f"{CONFIG} next to {path}: {error}") from error
