"""The C++ operators as a `functional.kernels.Kernel`.

Q queries, L lists, P probes, N vectors, d dim, k results, H hits.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..functional import metric as metrics
from ..functional.codec import MOST_DIM, Codes
from ..functional.filters import Filter
from ..functional.kernels import KERNELS
from ..functional.lists import InvertedLists
from ..functional.probe import Coarse
from . import library

_MOST_ROWS = 1 << 31  # the kernel counts rows in 32 bits
_DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.uint8)  # the last of coded rows
_WORKSPACE = 64 << 20  # bytes, for `probe` and `nearest`


class NativeKernel:
    """Calls of the operators, whose arguments must be contiguous."""

    def available(self, x: Tensor) -> bool:
        """Whether it can be used now, for queries (Q, d) of this device and dtype."""
        return x.is_cpu and x.dtype == torch.float32 and library.available()

    def serves(self, vectors: Tensor) -> bool:
        """Whether it supports the dtype, layout and number of these stored vectors (N, d)."""
        return vectors.dtype in _DTYPES and vectors.is_contiguous() and vectors.shape[0] < _MOST_ROWS

    def probe(self, x: Tensor, coarse: Coarse, nprobe: int, metric: str) -> tuple[Tensor, Tensor]:
        """The nearest lists of finite queries x (Q, d), nearest first: exact scores and lists (Q, min(nprobe, L))."""
        return _call("probe", x.contiguous(), _tensors(coarse), nprobe, metrics.by_differences(metric), _WORKSPACE)

    def multiplies_codes(self) -> bool:
        """Whether it has fast products of 8-bit integers, so that a search with codes takes less time."""
        return bool(torch.ops.torch_ivf_module.isa() != "baseline")

    def encode(self, lists: InvertedLists, d: int) -> Codes | None:
        """The codes of all rows of the lists, None if d is too large; ``serves(lists.packed)`` must be true."""
        few = d <= MOST_DIM
        return Codes(*_call("encode_lists", lists.packed, lists.offsets, lists.sizes, d)) if few else None

    def filters(self) -> bool:
        """Whether `search` takes a filter for each query."""
        return True

    def search(
        self,
        x: Tensor,
        coarse: Coarse,
        segments: Sequence[InvertedLists],
        codes: Codes | None,
        probed: Tensor | None,
        limits: Tensor | None,
        *,
        k: int,
        kept: int,
        nprobe: int,
        max_codes: int | None,
        metric: str,
        max_bytes: int,
        filter: Filter | None = None,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """A whole search in one call: scores, rows and ids (Q, k), which queries (Q,) took a second pass, and how many
        rows of each were scored exactly, (Q,).

        The arguments of the operator are x; [centroids, bias, origin, *codes of the centroids, if any]; the fields of
        one or two InvertedLists; those of the Codes of the first, or None; probed lists and the rows to read of each
        (Q, P), or None; k, kept, nprobe, max_codes (0 for no limit), whether exact scores are computed from
        differences, and the workspace in bytes. With probed lists nprobe and max_codes are ignored. With a filter its
        fields follow.
        """
        fields = [*map(Tensor.contiguous, itertools.chain(*segments))]
        results: tuple[Tensor, Tensor, Tensor, Tensor, Tensor] = torch.ops.torch_ivf_module.search_index.default(
            x.contiguous(),
            _tensors(coarse),
            fields,
            None if codes is None else list(codes),
            None if probed is None else probed.contiguous(),
            None if limits is None else limits.contiguous(),
            k,
            kept,
            nprobe,
            max_codes or 0,
            metrics.by_differences(metric),
            max_bytes,
            *([] if filter is None else _fields_of(filter)),
        )
        return results

    def cells(self, probed: Tensor, groups: Tensor, cells: Sequence[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """The cells of the groups (Q,) in the lists probed (Q, P): offsets, sizes, and those of each query (Q, P)."""
        return _call("group_cells", probed.contiguous(), groups.contiguous(), [*map(Tensor.contiguous, cells)])

    def above(self, x: Tensor, lists: InvertedLists, probed: Tensor, threshold: Tensor) -> tuple[Tensor, Tensor]:
        """The rows of the probed lists with a ranking score above threshold (Q,): lims (Q + 1,) and rows (H,)."""
        stored = lists.packed, lists.bias, lists.offsets, lists.sizes
        return _call("scan_above", x.contiguous(), *stored, probed.contiguous(), threshold.contiguous())

    def nearest(self, x: Tensor, vectors: Tensor, bias: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """The k vectors (N, d) of highest ranking score: scores and rows (Q, k), best first."""
        offsets = torch.tensor([0, vectors.shape[0]], device=x.device)
        lists = offsets, offsets.flip(0), offsets.new_zeros(x.shape[0], 1)  # one list, which every query visits
        return _call("scan", x.contiguous(), vectors, bias, *lists, None, k, _WORKSPACE)


def _fields_of(filter: Filter) -> list[Any]:
    """numbers, mask, and the fields of both lists of ids, as the operator takes them."""
    mask = None if filter.mask is None else filter.mask.contiguous()
    lists = (None if part is None else [*map(Tensor.contiguous, part)] for part in (filter.allowed, filter.excluded))
    return [filter.numbers.contiguous(), mask, *lists]


def _tensors(coarse: Coarse) -> list[Tensor]:
    return [coarse.centroids, coarse.bias, coarse.origin, *(coarse.codes or ())]


def _call(name: str, *arguments: Any) -> Any:
    return getattr(torch.ops.torch_ivf_module, name)(*arguments)


KERNELS.append(NativeKernel())
