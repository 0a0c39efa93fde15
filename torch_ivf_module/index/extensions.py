"""Methods implemented by modules above this package, which register their functions: files, the Hub, graphs, plots."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import nn

from .coding import Setting
from .eager import eager

if TYPE_CHECKING:
    from ..graph import SearchGraph
    from .base import IndexBase

Self = TypeVar("Self", bound=nn.Module)

_PROVIDED: dict[str, Callable[..., Any]] = {}


def provide(**functions: Callable[..., Any]) -> None:
    """Register the functions that the methods of these names call; `torch_ivf_module/__init__.py` does."""
    _PROVIDED.update(functions)


# -- methods of IndexBase and IndexPreTransform --------------------------------------------------------------


def save(self: nn.Module, path: str | os.PathLike[str]) -> None:
    """Write the index to a file: in safetensors format for the suffix ``.safetensors``, otherwise for torch.load.

    It is written to a temporary file in the same folder, synced and renamed, so after a crash the old file or the new
    one is complete. Raises TypeError for an `IndexPreTransform` whose transform does not consist of `nn.Linear` and
    `Normalize`; save its state_dict instead.
    """
    _PROVIDED["save"](self, path)


@classmethod  # type: ignore[misc]
def load(
    cls: type[Self],
    path: str | os.PathLike[str],
    map_location: torch.device | str | None = None,
    *,
    mmap: bool = False,
    codes: Setting = "saved",
) -> Self:
    """`torch_ivf_module.load` for a file with an index of this class; TypeError for another class."""
    return _of_class(cls, _PROVIDED["load"](path, device=map_location, mmap=mmap, codes=codes), path)


def save_pretrained(self: nn.Module, folder: str | os.PathLike[str], **settings: Any) -> Any:
    """Write the index to a folder in the layout of the Hugging Face Hub; see `torch_ivf_module.hub` (extra `hub`)."""
    return _PROVIDED["save_pretrained"](self, folder, **settings)


def push_to_hub(self: nn.Module, repo_id: str, **settings: Any) -> Any:
    """Upload the index to the Hugging Face Hub; see `torch_ivf_module.hub` (extra `hub`)."""
    return _PROVIDED["push_to_hub"](self, repo_id, **settings)


@classmethod  # type: ignore[misc]
def from_pretrained(cls: type[Self], name: str | os.PathLike[str], **settings: Any) -> Self:
    """Open an index of this class from a folder or the Hub; see `torch_ivf_module.hub` (extra `hub`)."""
    return _of_class(cls, _PROVIDED["from_pretrained"](name, **settings), name)


def _of_class(cls: type[Self], index: Any, name: str | os.PathLike[str]) -> Self:
    if not isinstance(index, cls):
        raise TypeError(f"{os.fspath(name)} holds an {type(index).__name__}, not an {cls.__name__}")
    return index


# -- methods of IndexBase ------------------------------------------------------------------------------------


@eager
def graph(
    self: IndexBase,
    k: int | None = None,
    nprobe: int | None = None,
    *,
    max_codes: int | None = None,
    storage: torch.dtype | None = None,
    layout: str = "rows",
    exclude: int | None = None,
) -> SearchGraph:
    """The search as a module of static shapes, for torch.compile and the formats of `torch_ivf_module.export`.

    Parameters
    ----------
    k, nprobe, max_codes : by default those of the index.
    storage : dtype of the scanned vectors (float32, float16, bfloat16); by default that of the index.
    layout : "rows" scans the buffers of the index. If `storage` is another dtype, it scans a copy, and distances are to
        the vectors of the copy. "tiles" scans a copy of N * d * itemsize bytes in a layout for which compilers generate
        faster code; results are scored with the vectors of the index.
    exclude : number of ids that each query must not find. The graph then has another input, ``exclude=`` int64
        (..., exclude); -1 excludes nothing.

    Make the graph again after every change of the index. `forward` uses a graph that was made without `k`, `nprobe`,
    `max_codes`, `storage` and `exclude` under torch.compile, until a setting of the index changes. Raises RuntimeError
    for an untrained index, ValueError for a wrong setting.
    """
    made: SearchGraph = _PROVIDED["graph"](
        self, k=k, nprobe=nprobe, max_codes=max_codes, storage=storage, layout=layout, exclude=exclude
    )
    if all(setting is None for setting in (k, nprobe, max_codes, storage, exclude)):
        self.store.graph = made  # not a submodule: its buffers are this module's
    return made


def plot(self: IndexBase, ax: Any = None) -> Any:
    """Draw a histogram of the list sizes with matplotlib (extra `plot`), and return the axes.

    See `torch_ivf_module.plotting`, which can also plot a result of `tune`.

    >>> from torch_ivf_module import IndexIVFFlat
    >>> x = torch.randn(1000, 16, generator=torch.Generator().manual_seed(0))
    >>> IndexIVFFlat(16, nlist=8).fit(x).plot().get_title()
    '8 lists'
    """
    return _PROVIDED["plot"](self, ax)
