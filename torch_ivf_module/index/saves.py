"""The files of an index as methods; `checkpoint` and `hub` do the work."""

from __future__ import annotations

import os
from typing import Any, TypeVar, cast

import torch
from torch import nn

Self = TypeVar("Self", bound="Saves")


class Saves(nn.Module):
    """A module with files of its own, beside its state_dict."""

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the index to one file: safetensors for a ``.safetensors`` suffix, else what torch.load opens.

        The file is written beside its place, synced and renamed, so a crash leaves the old one or the new one. Raises
        TypeError for an `IndexPreTransform` whose transform is not made of `nn.Linear` and `Normalize`: save the
        state_dict of that.
        """
        from ..checkpoint import save

        save(cast(Any, self), path)

    @classmethod
    def load(
        cls: type[Self],
        path: str | os.PathLike[str],
        map_location: torch.device | str | None = None,
        *,
        mmap: bool = False,
    ) -> Self:
        """`torch_ivf_module.load` for a file that holds an index of this class; TypeError for one of another."""
        from ..checkpoint import load

        return cls._own(load(path, device=map_location, mmap=mmap), path)

    def save_pretrained(self, folder: str | os.PathLike[str], **settings: Any) -> Any:
        """Write the index to a folder as the Hugging Face Hub has them; see `torch_ivf_module.hub` (extra `hub`)."""
        from ..hub import save_pretrained

        return save_pretrained(cast(Any, self), folder, **settings)

    def push_to_hub(self, repo_id: str, **settings: Any) -> Any:
        """Upload the index to the Hugging Face Hub; see `torch_ivf_module.hub` (extra `hub`)."""
        from ..hub import push_to_hub

        return push_to_hub(cast(Any, self), repo_id, **settings)

    @classmethod
    def from_pretrained(cls: type[Self], name: str | os.PathLike[str], **settings: Any) -> Self:
        """Open an index of this class in a folder or on the Hub; see `torch_ivf_module.hub` (extra `hub`)."""
        from ..hub import from_pretrained

        return cls._own(from_pretrained(name, **settings), name)

    @classmethod
    def _own(cls: type[Self], index: Any, name: str | os.PathLike[str]) -> Self:
        if not isinstance(index, cls):
            raise TypeError(f"{os.fspath(name)} holds an {type(index).__name__}, not an {cls.__name__}")
        return index
