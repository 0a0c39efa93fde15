"""Vector search inside PyTorch: an inverted-file index that is a torch.nn.Module.

>>> import torch
>>> from torch_ivf_module import IndexFlatL2
>>> index = IndexFlatL2(2)
>>> index.add(torch.tensor([[0.0, 0.0], [1.0, 1.0]]))
>>> index.search(torch.tensor([[0.9, 1.0]]), 1)[1]
tensor([[1]])
"""

import importlib
from typing import TYPE_CHECKING, Any

from . import _pytorch as _pytorch  # first, so that a missing PyTorch is told of by name
from . import checkpoint, hub, plotting
from .averaging import AveragedModel
from .checkpoint import load
from .factory import index_factory
from .faiss_bridge import from_faiss, to_faiss
from .graph import SearchGraph
from .index import (
    IndexFlat,
    IndexFlatIP,
    IndexFlatL2,
    IndexIVFFlat,
    IndexIVFScalarQuantizer,
    IndexPreTransform,
    IndexScalarQuantizer,
    extensions,
)
from .maxsim import MaxSim
from .maxsim_graph import MaxSimGraph
from .parallel import check_ddp, ignore_in_ddp
from .params import SearchParams
from .sharded import ShardedIndex
from .tune import tune

extensions.provide(
    save=checkpoint.save,
    load=load,
    graph=SearchGraph,
    plot=plotting.plot_list_sizes,
    save_pretrained=hub.save_pretrained,
    push_to_hub=hub.push_to_hub,
    from_pretrained=hub.from_pretrained,
)

if TYPE_CHECKING:
    from . import export as export
    from . import faiss_compat as faiss_compat
    from . import functional as functional
    from . import native as native
    from .streaming import build_file as build_file

# Attributes without an import of their own, loaded on first use.
_SUBMODULES = ("export", "faiss_compat", "functional", "native")
_FUNCTIONS = {"build_file": "streaming"}  # and the modules that have them
__version__ = "0.1.0"

__all__ = [
    "AveragedModel",
    "IndexFlat",
    "IndexFlatIP",
    "IndexFlatL2",
    "IndexIVFFlat",
    "IndexIVFScalarQuantizer",
    "IndexPreTransform",
    "IndexScalarQuantizer",
    "MaxSim",
    "MaxSimGraph",
    "SearchGraph",
    "SearchParams",
    "ShardedIndex",
    "build_file",
    "check_ddp",
    "from_faiss",
    "ignore_in_ddp",
    "index_factory",
    "load",
    "to_faiss",
    "tune",
]


def __getattr__(name: str) -> Any:
    if name in _SUBMODULES:
        return importlib.import_module(f".{name}", __name__)
    if name in _FUNCTIONS:
        return getattr(importlib.import_module(f".{_FUNCTIONS[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_SUBMODULES, *_FUNCTIONS})
