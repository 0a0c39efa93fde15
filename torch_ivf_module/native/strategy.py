"""The kernel as a search calls it, see `functional.kernels.Kernel`.

Q queries, L lists, P probes, N vectors, d dim, k results, K candidates a query, H hits.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..functional import metric as metrics
from ..functional.kernels import KERNELS
from ..functional.lists import InvertedLists
from . import library

_MOST_ROWS = 1 << 31  # the kernel counts rows in 32 bits
# Queries that visit a list, on average, from which rounding them and its rows should pay. Not measured: no CPU with
# units for bfloat16 was at hand.
_ROUNDING_PAYS = 24
_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
_SCRATCH = 64 << 20  # bytes for finding the nearest of some vectors, of which nothing else bounds the memory


class NativeKernel:
    """Calls of the functions in C++, whose arguments have to lie in one piece."""

    def serves(self, x: Tensor, vectors: Tensor) -> bool:
        """Whether it is there for such queries (Q, d) and stored vectors (N, d)."""
        fits = x.device.type == "cpu" and x.dtype == torch.float32 and vectors.dtype in _DTYPES
        return fits and vectors.is_contiguous() and vectors.shape[0] < _MOST_ROWS and library.available()

    def scan(
        self, x: Tensor, lists: InvertedLists, probed: Tensor, limits: Tensor | None, k: int, width: int, max_bytes: int
    ) -> tuple[Tensor, Tensor]:
        """The k best rows of the probed lists by ranking score. `width` plays no part."""
        return _call("scan", *_lists(x, lists, probed), _whole(limits), _at_most(k, lists), max_bytes)

    def bounds(
        self,
        x: Tensor,
        lists: InvertedLists,
        probed: Tensor,
        limits: Tensor | None,
        k: int,
        max_bytes: int,
        metric: str,
    ) -> tuple[Tensor, Tensor] | None:
        """A scan with rounded vectors, see docs/native.md; None where few queries share a list."""
        if not rounding() or probed.numel() < _ROUNDING_PAYS * (lists.sizes.shape[0] - 1):
            return None
        differences = metrics.by_differences(metric)
        rest = _whole(limits), _at_most(k, lists), max_bytes, differences
        return _call("scan_bounds", *_lists(x, lists, probed), *rest)

    def exact_scores(self, x: Tensor, packed: Tensor, rows: Tensor, metric: str) -> Tensor:
        """Exact scores (Q, K) of rows (Q, K) of `packed` (N, d), -inf for a row of -1."""
        return _call("exact_scores", x.contiguous(), packed, rows.contiguous(), metrics.by_differences(metric))

    def above(self, x: Tensor, lists: InvertedLists, probed: Tensor, floor: Tensor) -> tuple[Tensor, Tensor]:
        """Queries and rows (H,) of the probed lists with a ranking score above floor (Q,)."""
        return _call("scan_above", *_lists(x, lists, probed), floor.contiguous())

    def nearest(self, x: Tensor, vectors: Tensor, bias: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """The k vectors (N, d) of highest ranking score: scores and rows (Q, k), best first."""
        offsets = torch.tensor([0, vectors.shape[0]], device=x.device)
        lists = offsets, offsets.flip(0), offsets.new_zeros(x.shape[0], 1)  # one, which all visit
        return _call("scan", x.contiguous(), vectors, bias, *lists, None, k, _SCRATCH)


def rounding() -> bool:
    """Whether torch has units for products of bfloat16 tiles here, so that rounded vectors are multiplied faster."""
    return bool(_call("has_bfloat16_units"))


def _call(name: str, *arguments: Any) -> Any:
    return getattr(torch.ops.torch_ivf_module, name)(*arguments)


def _lists(x: Tensor, lists: InvertedLists, probed: Tensor) -> tuple[Tensor, ...]:
    """What all scans take first."""
    return x.contiguous(), lists.packed, lists.bias, lists.offsets, lists.sizes, probed.contiguous()


def _whole(limits: Tensor | None) -> Tensor | None:
    return None if limits is None else limits.contiguous()


def _at_most(k: int, lists: InvertedLists) -> int:
    return min(k, lists.packed.shape[0])


KERNELS.append(NativeKernel())
