"""SearchGraph: the search of an index as a module of static shapes, for torch.compile and every export format.

Q queries, L lists, N vectors, d dim, k results.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from .functional import metric as metrics
from .functional.chunking import tracing
from .functional.lists import InvertedLists, ids_at, is_selected, mask_rows, vectors_at
from .functional.probe import Coarse, probe_by_ranking
from .functional.rescore import rescore
from .functional.row_codes import SplitRows, split, vectors_of
from .functional.scan_queries import scan_queries
from .functional.scan_tiles import Tiles, mask_tiles, most_tiles, scan_tiles, tiles_of
from .functional.search import candidate_count, capped_lists, finite_queries, shifted_queries
from .functional.transforms import differentiable, outside, scored, tracked
from .index import validation
from .index.base import IndexBase
from .index.eager import recorded_by_fx
from .index.row_format import STORAGE
from .params import positive

Self = TypeVar("Self", bound="SearchGraph")
LAYOUTS = ("rows", "tiles")
_SHARED = {"list_packed": "packed_embeddings"}  # the buffer of an index whose name is not "list_" + the field


class SearchGraph(nn.Module):
    """The search of one index with constant settings and static shapes; made by ``index.graph()``.

    It calls the same functions as ``search_mode="matrix"``, and reads nothing back from the device. So torch.compile
    compiles it to one graph for all batch sizes, and torch.export, AOTInductor, ONNX and TorchScript can save it (see
    `torch_ivf_module.export`). The vectors are the buffers of the index, or a copy of its codes. They are not in the
    ``state_dict`` of the graph.

    `k`, `nprobe`, `max_codes` and the number of candidates of a query are constant. The number of candidates is the
    total length of the `nprobe` longest lists, and determines the time of every query. Vectors that are added later are
    not in the graph. If its index has changed, a graph raises RuntimeError. An exported file cannot do so, and in-place
    writes to the buffers are not detected.

    Results are those of `search`, with two exceptions. If the k-th and the next neighbours, or the nearest lists,
    differ by less than float32 rounding, `search` makes a second pass, and a graph does not. And a graph does not find
    rows whose scores overflow.

    >>> from torch_ivf_module import IndexFlatL2
    >>> index = IndexFlatL2(2)
    >>> index.add(torch.tensor([[0.0, 0.0], [1.0, 1.0]]))
    >>> index.graph(k=1)(torch.tensor([[0.9, 1.0]]))[1]
    tensor([[1]])
    """

    packed_embeddings: Tensor
    list_ids: Tensor

    def __init__(
        self,
        index: IndexBase,
        *,
        k: int | None = None,
        nprobe: int | None = None,
        max_codes: int | None = None,
        storage: torch.dtype | None = None,
        layout: str = "rows",
        exclude: int | None = None,
    ) -> None:
        super().__init__()
        index.store.require_trained("graph")
        if layout not in LAYOUTS:
            raise ValueError(f"layout must be one of {', '.join(map(repr, LAYOUTS))}, got {layout!r}")
        if storage is not None and storage not in STORAGE:
            raise ValueError(f"storage must be torch.float32, torch.float16 or torch.bfloat16, got {storage}")
        self.d, self.metric = index.d, index.metric
        self.k = index.k if k is None else positive(k, "k")
        self.layout = layout
        self.exclude = 0 if exclude is None else positive(exclude, "exclude")
        self.max_bytes = index.max_bytes
        own = index.search_options(self.k)
        nlist = int(index.list_sizes().shape[0])
        self.nprobe = own.nprobe if nprobe is None else min(max(1, nlist), positive(nprobe, "nprobe"))
        self.max_codes = own.max_codes if max_codes is None else positive(max_codes, "max_codes")
        with index.store.lock:
            coarse, (lists,) = index.store.versions.whole().lists()
            self._version_token = index.store.version
        self._excluded_rows = self.exclude * _most_of_one_id(lists.ids) if exclude else 0
        self._width = int(torch.sort(lists.sizes, descending=True).values[: self.nprobe].sum())
        self._tiles = 0
        if layout == "tiles":
            tiles = tiles_of(lists, self.d, storage or index.dtype)
            self._tiles = most_tiles(tiles, self.nprobe)
            self._register_tensors("tile", tiles)
        elif storage is not None:
            lists = lists._replace(packed=vectors_of(lists.packed, self.d).to(storage))
        self._register_tensors("coarse", coarse._replace(codes=None))  # which are for kernels
        self._coded = lists.packed.dtype == torch.uint8
        self._register_tensors("list", lists)
        if self._coded:
            del self._buffers[_buffer("list", "packed")]
            codes, ranges = split(lists.packed)
            # A copy, since torch.export warns of views of larger tensors.
            self._register_tensors("row", SplitRows(codes.clone(memory_format=torch.contiguous_format), ranges))

    def _register_tensors(self, name: str, tensors: Any) -> None:
        """Register the fields of a named tuple of tensors as buffers."""
        for field, tensor in zip(tensors._fields, tensors, strict=True):
            self.register_buffer(_buffer(name, field), tensor, persistent=False)

    def _tensors(self, kind: Any, name: str) -> Any:
        """The named tuple of class `kind` that was registered under this name."""
        return kind(*(getattr(self, _buffer(name, field)) for field in kind._fields))

    def _apply(self: Self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        # Tensors move with the parent module but keep their dtypes: half() would round biases and centroids.
        before = dict(self._buffers)
        super()._apply(fn, recurse)
        for name, tensor in before.items():
            moved = self._buffers[name]
            if tensor is not None and moved is not None and moved.dtype != tensor.dtype:
                self._buffers[name] = tensor.to(moved.device)
        return self

    def lists(self) -> InvertedLists:
        """The inverted lists that are searched."""
        if not self._coded:
            lists: InvertedLists = self._tensors(InvertedLists, "list")
            return lists
        others = (getattr(self, _buffer("list", field)) for field in InvertedLists._fields[1:])
        rows: Any = self._tensors(SplitRows, "row")  # which the functions of row_codes read like a tensor of rows
        return InvertedLists(rows, *others)

    def coarse(self) -> Coarse:
        """The coarse quantizer."""
        coarse: Coarse = self._tensors(Coarse, "coarse")
        return coarse

    def __prepare_scriptable__(self) -> nn.Module:
        """What torch.jit.script compiles in place of this module."""
        from .torchscript import ScriptedSearch

        return ScriptedSearch(self)

    def forward(
        self, x: Tensor, mask: Tensor | None = None, exclude: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """D and I, both (..., k), for queries x (..., d), as `search` gives them.

        `mask` (n,) bool says for each id below n whether it may be found; other ids may not. A mask (..., n) has a row
        for each query. A graph made with ``exclude=m`` also takes `exclude` (..., m) int64, the ids that each query
        must not find; -1 excludes nothing.
        """
        if (node := recorded_by_fx(self, x)) is not None:
            return node
        if torch.jit.is_tracing():  # type: ignore[attr-defined]
            from .torchscript import quietly

            with quietly():
                return self._layer(x, mask, exclude)
        return self._layer(x, mask, exclude)

    def _layer(self, x: Tensor, mask: Tensor | None, exclude: Tensor | None) -> tuple[Tensor, Tensor]:
        self.check_current()
        if self.list_ids.is_meta:
            raise RuntimeError("the graph has no values, being on the meta device: make it of an index that has")
        x = validation.layer_input(x, "x", self.d, self.list_ids.device)
        device = self.list_ids.device
        if mask is not None:
            mask = validation.layer_mask(mask, "mask", x.shape[:-1], device)
            mask = mask if mask.dim() == 1 else mask.flatten(0, -2)
        if (exclude is not None) != bool(self.exclude):
            raise ValueError("exclude must be passed if the graph was made by index.graph(exclude=m), and only then")
        if exclude is not None:
            exclude = validation.layer_ids(exclude, "exclude", x.shape[:-1], self.exclude, device)
            exclude = exclude.reshape(-1, self.exclude)
        if x.dim() == 2:
            return self.rows(x, mask, exclude)
        found, ids = self.rows(x.reshape(-1, self.d), mask, exclude)
        return found.view(*x.shape[:-1], self.k), ids.view(*x.shape[:-1], self.k)

    def check_current(self) -> None:
        """Raise RuntimeError if the index has changed since this graph was made of it."""
        if self._version_token.changed:
            raise RuntimeError("the index has changed since this graph was made of it: call index.graph(...) again")

    def rows(
        self, x: Tensor, mask: Tensor | None = None, exclude: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """`forward` for x (Q, d), unchecked."""
        if torch.is_autocast_enabled(x.device.type):
            with torch.autocast(x.device.type, enabled=False):
                return self._search(x, mask, exclude)
        return self._search(x, mask, exclude)

    def _search(self, x: Tensor, mask: Tensor | None, exclude: Tensor | None) -> tuple[Tensor, Tensor]:
        queries, lists = metrics.prepare(x.float(), self.metric), self.lists()
        recorded = tracing()
        if recorded or not differentiable(queries):
            scores_of = metrics.differentiable_scores if recorded else metrics.exact_scores
            candidates = self._candidates(queries, mask, exclude)
            scores, rows = rescore(queries, lists.packed, candidates, self.k, self.metric, scores_of)
            return metrics.to_distance(scores, self.metric), ids_at([lists.ids], rows)

        for name, buffer in self._buffers.items():
            if buffer is not None and tracked(buffer):
                raise RuntimeError(
                    f"{name} requires grad or is a dual tensor, but with such x a graph has derivatives with respect "
                    "to x alone: detach it"
                )

        def find(plain: Tensor) -> tuple[Tensor, ...]:
            filters = (_as_many(part, plain.shape[0], x.shape[0]) for part in (mask, exclude))
            rows = rescore(plain, lists.packed, self._candidates(plain, *filters), self.k, self.metric)[1]
            return ids_at([lists.ids], rows), vectors_at([lists.packed], rows, self.d)

        ids, vectors = outside(find, queries)
        scores, ids, _ = scored(queries, ids, vectors, self.metric)
        return metrics.to_distance(scores, self.metric), ids

    @torch.no_grad()
    def _candidates(self, x: Tensor, mask: Tensor | None, exclude: Tensor | None) -> Tensor:
        """The rows (Q, K) to score exactly, -1 for padding, for prepared queries x (Q, d).

        With ids to exclude (Q, m) there are as many more as these can have rows, which are then left out.
        """
        rows = self._best_rows(x, mask)
        if exclude is None or not rows.shape[1]:
            return rows
        ids = self.list_ids[rows.clamp(min=0)]
        return rows.masked_fill((ids[:, :, None] == exclude[:, None]).any(2), -1)

    def _best_rows(self, x: Tensor, mask: Tensor | None) -> Tensor:
        lists, coarse, kept = self.lists(), self.coarse(), candidate_count(self.k + self._excluded_rows)
        x, finite = finite_queries(x.detach())
        nearest = probe_by_ranking(x, coarse, self.nprobe, self.metric)
        probed, _ = capped_lists(nearest, finite, coarse, [lists], self.max_codes)
        # Computed before the scan, so that compilers do not subtract the origin again for every candidate.
        y = shifted_queries(x, coarse.origin, self.metric)
        each = mask if mask is not None and mask.dim() == 2 else None  # of each query
        allowed = None if mask is None or each is not None else is_selected(lists.ids, mask)
        if self._tiles:
            tiles = self._tensors(Tiles, "tile")
            tiles = tiles if allowed is None else mask_tiles(tiles, allowed)
            return scan_tiles(y, tiles, probed, kept, self._tiles, self.max_bytes, each, lists.ids)[1]
        width = min(self._width, lists.packed.shape[0])
        if width == 0:
            return probed[:, :0]
        lists = lists if allowed is None else mask_rows(lists, allowed)
        return scan_queries(y, lists, probed, None, kept, width, self.max_bytes, each)[1]

    def extra_repr(self) -> str:
        shape = f"k={self.k}, nprobe={self.nprobe}, max_codes={self.max_codes}, width={self._width}"
        shape += f", exclude={self.exclude}" if self.exclude else ""
        return f"{self.d}, metric={self.metric!r}, {shape}, layout={self.layout!r}"


def _most_of_one_id(ids: Tensor) -> int:
    """How many rows have the same id, at most; ids (N,)."""
    return int(torch.unique(ids, return_counts=True)[1].max()) if ids.shape[0] else 0


def _as_many(part: Tensor | None, queries: int, given: int) -> Tensor | None:
    """A filter of `given` queries for those of all entries of a batch of vmap; one (n,) for all queries as it is."""
    return part if part is None or part.dim() == 1 else part.repeat(queries // max(1, given), 1)


def _buffer(name: str, field: str) -> str:
    return _SHARED.get(f"{name}_{field}", f"{name}_{field}")
