"""An index of transformed vectors: by a rotation, a projection, a normalisation, or any encoder.

Q queries, N vectors, k results.
"""

from __future__ import annotations

from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.compiler import is_dynamo_compiling

from ..params import SearchParams, positive
from . import extensions, training, validation
from .base import IndexBase
from .eager import recorded_by_fx, refuse_scripting

Self = TypeVar("Self", bound="IndexPreTransform")


class Normalize(nn.Module):
    """Scales rows to unit length; a row of zeros stays zero.

    >>> Normalize()(torch.tensor([[3.0, 4.0]]))
    tensor([[0.6000, 0.8000]])
    """

    def forward(self, x: Tensor) -> Tensor:
        """x (..., d) at unit length."""
        return torch.nn.functional.normalize(x, dim=-1, eps=torch.finfo(torch.float32).tiny)


def _of_index(name: str) -> property:
    """A setting or a method of the index, which needs no vector before the transform."""

    def put(self: IndexPreTransform, value: Any) -> None:
        getattr(self.index, name)  # AttributeError where a module would take any name
        setattr(self.index, name, value)

    return property(lambda self: getattr(self.index, name), put, doc=f"`{name}` of the index.")


class IndexPreTransform(nn.Module):
    """Applies `transform` to vectors and queries before they are passed to `index`, like faiss's class.

    Parameters
    ----------
    d : dimension of the vectors before the transform.
    transform : a module that maps (n, d) to (n, index.d), float32.
    index : a flat or inverted-file index. Its settings, such as `nprobe`, and its methods are available on this module
        too.

    >>> from torch_ivf_module import IndexFlat
    >>> index = IndexPreTransform(4, nn.Linear(4, 2).requires_grad_(False), IndexFlat(2))
    >>> index.add(torch.eye(4))
    >>> index.search(torch.eye(4)[1:2], 1)[1]
    tensor([[1]])
    """

    __prepare_scriptable__ = refuse_scripting

    def __init__(self, d: int, transform: nn.Module, index: IndexBase) -> None:
        super().__init__()
        if not isinstance(index, IndexBase):
            raise TypeError(f"index must be a flat or inverted-file index, got {type(index).__name__}")
        self.d = positive(d, "d")
        self.transform = transform if isinstance(transform, nn.Sequential) else nn.Sequential(transform)
        self.index = index

    ntotal, is_trained, metric, device, dtype = map(_of_index, ("ntotal", "is_trained", "metric", "device", "dtype"))
    k, search_mode, codes, max_bytes = map(_of_index, ("k", "search_mode", "codes", "max_bytes"))
    nlist, nprobe, max_codes = map(_of_index, ("nlist", "nprobe", "max_codes"))
    last_search_stats = _of_index("last_search_stats")
    list_sizes, list_stats, imbalance_factor = map(_of_index, ("list_sizes", "list_stats", "imbalance_factor"))
    list_ordering, rebuild_lists, plot = map(_of_index, ("list_ordering", "rebuild_lists", "plot"))
    check_buffers, rebalance, auto_rebalance = map(_of_index, ("check_buffers", "rebalance", "auto_rebalance"))

    def apply_transform(self, x: Tensor, name: str = "x") -> Tensor:
        """Transformed vectors (n, index.d), float32, of x (n, d)."""
        if not is_dynamo_compiling():  # which would make a buffer, whose device is read, an input of the graph
            x = validation.vectors(x, name, self.d, self.index.device)
        return self._through(x)

    def _through(self, x: Tensor) -> Tensor:
        """The transform of x (..., d), in the dtype of its own parameters, whatever autocast says."""
        own = next((part.dtype for part in self.transform.parameters() if part.is_floating_point()), torch.float32)
        with torch.autocast(x.device.type, enabled=False):
            found: Tensor = self.transform(x.to(own))
        return found

    train = training.train

    def fit(self: Self, x: Tensor, **settings: Any) -> Self:
        """Fit the index, not the transform, to vectors x (n, d); settings as in `IndexIVF.fit`."""
        self.index.fit(self.apply_transform(x), **settings)
        return self

    def retrain(self, x: Tensor | None = None, **settings: Any) -> Any:
        """Continue k-means on x (n, d) or the stored vectors; see `IndexIVF.retrain`. The transform stays."""
        retrain = self.index.retrain  # AttributeError of a flat index
        return retrain(None if x is None else self.apply_transform(x), **settings)

    def add(self, x: Tensor, *, groups: Tensor | None = None) -> None:
        """Add vectors x (n, d) of groups (n,); see `IndexBase.add`."""
        self.index.add(self.apply_transform(x), groups=groups)

    def add_with_ids(self, x: Tensor, ids: Tensor, *, groups: Tensor | None = None) -> None:
        """Add vectors x (n, d) of groups (n,) under ids (n,); see `IndexBase.add_with_ids`."""
        self.index.add_with_ids(self.apply_transform(x), ids, groups=groups)

    def groups_of(self, ids: Tensor) -> Tensor:
        """The groups (n,) of ids (n,); see `IndexBase.groups_of`."""
        return self.index.groups_of(ids)

    def group_sizes(self) -> tuple[Tensor, Tensor]:
        """The groups of the rows and the number of rows of each; see `IndexBase.group_sizes`."""
        return self.index.group_sizes()

    def remove_ids(self, ids: Tensor) -> int:
        """Remove vectors by id; see `IndexBase.remove_ids`."""
        return self.index.remove_ids(ids)

    def update(self, ids: Tensor, x: Tensor, *, groups: Tensor | None = None) -> None:
        """Replace the vectors of ids (n,) by x (n, d); see `IndexBase.update`."""
        self.index.update(ids, self.apply_transform(x), groups=groups)

    def merge_from(self, other: IndexPreTransform, add_id: int = 0) -> None:
        """Move all vectors of `other`, whose transform must be the same; see `IndexBase.merge_from`.

        Raises TypeError or ValueError saying what differs; both indexes are unchanged then.
        """
        if not isinstance(other, IndexPreTransform):
            raise TypeError(f"other must be an IndexPreTransform, got {type(other).__name__}")
        own, theirs = self.transform.state_dict(), other.transform.state_dict()
        alike = repr(self.transform) == repr(other.transform) and own.keys() == theirs.keys()
        if not alike or not all(torch.equal(value, theirs[name].to(value)) for name, value in own.items()):
            raise ValueError("other must have the same transform: its vectors are in another space")
        self.index.merge_from(other.index, add_id)

    def copy_subset(self: Self, ids: Tensor) -> Self:
        """A new index of the vectors of ids (n,), over the same transform; see `IndexBase.copy_subset`."""
        return type(self)(self.d, self.transform, self.index.copy_subset(ids))

    def reset(self) -> None:
        """Remove all vectors, and number from 0 again; transform and centroids stay."""
        self.index.reset()

    def search(self, x: Tensor, k: int, *, params: SearchParams | None = None) -> tuple[Tensor, Tensor]:
        """The k nearest of each query x (nq, d): D and I (nq, k); see `IndexBase.search`."""
        return self.index.search(self.apply_transform(x), k, params=params)

    def search_and_reconstruct(
        self, x: Tensor, k: int, *, params: SearchParams | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """`search` that also returns the transformed vectors found (nq, k, index.d)."""
        return self.index.search_and_reconstruct(self.apply_transform(x), k, params=params)

    def reconstruct(self, id: int) -> Tensor:
        """The transformed vector (index.d,) of an id; see `IndexBase.reconstruct`."""
        return self.index.reconstruct(id)

    def reconstruct_n(self, start: int, n: int) -> Tensor:
        """The transformed vectors (n, index.d) of n ids from `start` on; see `IndexBase.reconstruct_n`."""
        return self.index.reconstruct_n(start, n)

    def reconstruct_batch(self, ids: Tensor) -> Tensor:
        """The transformed vectors (n, index.d) of ids (n,); see `IndexBase.reconstruct_batch`."""
        return self.index.reconstruct_batch(ids)

    def memory_bytes(self) -> int:
        """Memory of the index and the transform, in bytes; see `IndexBase.memory_bytes`."""
        return self.index.memory_bytes() + sum(tensor.nbytes for tensor in self.transform.state_dict().values())

    def range_search(
        self, x: Tensor, radius: float | Tensor, *, params: SearchParams | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """All within the radius of each query x (nq, d): lims, D, I; see `IndexBase.range_search`."""
        return self.index.range_search(self.apply_transform(x), radius, params=params)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """``search(x, index.k)`` for x (..., d): D and I of shape (..., k)."""
        if (node := recorded_by_fx(self, x)) is not None:
            return node
        if not is_dynamo_compiling():
            x = validation.layer_input(x, "x", self.d, self.index.device)
        found: tuple[Tensor, Tensor] = self.index(self._through(x))
        return found

    def graph(self, **settings: Any) -> nn.Sequential:
        """Transform and search of static shapes; see `IndexBase.graph` for the settings."""
        return nn.Sequential(self.transform, self.index.graph(**settings))

    def steps(self) -> list[nn.Linear | Normalize]:
        """The transform as a sequence of `nn.Linear` and `Normalize`. TypeError if it is anything else."""
        found: list[nn.Linear | Normalize] = []
        for part in self.transform:
            if not isinstance(part, (nn.Linear, Normalize)):
                raise TypeError(f"transform must be made of nn.Linear and Normalize here, got {type(part).__name__}")
            found.append(part)
        return found

    save = extensions.save
    load = extensions.load
    save_pretrained = extensions.save_pretrained
    push_to_hub = extensions.push_to_hub
    from_pretrained = extensions.from_pretrained
