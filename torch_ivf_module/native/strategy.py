"""The kernel as a strategy of search.

Q queries, L lists, P probes, N vectors, d dim, k results, K candidates a query.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..functional import metric as metrics
from ..functional.lists import InvertedLists
from ..functional.search import STRATEGIES, Strategy
from . import library

_MOST_ROWS = 1 << 31  # the kernel counts rows in 32 bits
_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def serves(x: Tensor, lists: InvertedLists) -> bool:
    """Whether the kernel is there for such queries and lists."""
    packed = lists.packed
    fits = x.device.type == "cpu" and x.dtype == torch.float32 and packed.dtype in _DTYPES
    return fits and packed.is_contiguous() and packed.shape[0] < _MOST_ROWS and library.available()


def scan(
    x: Tensor, lists: InvertedLists, probed: Tensor, limits: Tensor | None, k: int, width: int, max_bytes: int
) -> tuple[Tensor, Tensor]:
    """The k best rows of the probed lists by ranking score, as the other scans give them. `width` plays no part."""
    kernel = torch.ops.torch_ivf_module.scan
    found: tuple[Tensor, Tensor] = kernel(
        x.contiguous(),
        lists.packed,
        lists.bias,
        lists.offsets,
        lists.sizes,
        probed.contiguous(),
        None if limits is None else limits.contiguous(),
        min(k, lists.packed.shape[0]),
        max_bytes,
    )
    return found


def exact_scores(x: Tensor, packed: Tensor, rows: Tensor, metric: str) -> Tensor:
    """Exact scores of rows (Q, K) of `packed` (N, d) for x (Q, d): (Q, K), -inf for a row of -1."""
    kernel = torch.ops.torch_ivf_module.exact_scores
    scores: Tensor = kernel(x.contiguous(), packed, rows.contiguous(), metrics.by_differences(metric))
    return scores


def register_fakes() -> None:
    """What the kernel's functions return, for whoever traces them."""

    @torch.library.register_fake("torch_ivf_module::scan")
    def _scan(x, packed, bias, offsets, sizes, probed, limits, k, max_bytes):  # type: ignore[no-untyped-def]
        return x.new_empty(x.shape[0], k), probed.new_empty(x.shape[0], k)

    @torch.library.register_fake("torch_ivf_module::exact_scores")
    def _exact_scores(x, packed, rows, differences):  # type: ignore[no-untyped-def]
        return x.new_empty(rows.shape)


STRATEGIES["native"] = Strategy(scan, exact_scores, serves)
