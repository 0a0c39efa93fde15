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
# Queries that visit a list, on average, from which rounding them and its rows pays.
_ROUNDING_PAYS = 24
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
    found: tuple[Tensor, Tensor] = torch.ops.torch_ivf_module.scan(*_arguments(x, lists, probed, limits, k), max_bytes)
    return found


def bounds(
    x: Tensor, lists: InvertedLists, probed: Tensor, limits: Tensor | None, k: int, max_bytes: int, metric: str
) -> tuple[Tensor, Tensor] | None:
    """The k rows of the probed lists whose exact score may be highest, and what it does not exceed, both (Q, k).

    Found with rounded vectors, see docs/native.md; x (Q, d) is *not* relative to the origin. The last bound of a query
    is infinite if nothing can be said. None where few queries share a list, for then float32 takes no longer.
    """
    if not rounding() or probed.numel() < _ROUNDING_PAYS * (lists.sizes.shape[0] - 1):
        return None
    kernel = torch.ops.torch_ivf_module.scan_bounds
    differences = metrics.by_differences(metric)
    found: tuple[Tensor, Tensor] = kernel(*_arguments(x, lists, probed, limits, k), max_bytes, differences, _bfloat16())
    return found


def rounding() -> bool:
    """Whether rounded vectors are multiplied faster than those in float32 here."""
    return torch.backends.cpu.get_cpu_capability() in ("AVX2", "AVX512")


def _bfloat16() -> bool:
    """Whether the CPU has units for products of bfloat16 tiles; 16-bit whole numbers are multiplied otherwise."""
    return bool(torch.cpu.get_capabilities().get("amx_bf16"))


def _arguments(
    x: Tensor, lists: InvertedLists, probed: Tensor, limits: Tensor | None, k: int
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor | None, int]:
    """What both scans of the kernel take first."""
    limits = None if limits is None else limits.contiguous()
    k = min(k, lists.packed.shape[0])
    return x.contiguous(), lists.packed, lists.bias, lists.offsets, lists.sizes, probed.contiguous(), limits, k


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

    @torch.library.register_fake("torch_ivf_module::scan_bounds")
    def _scan_bounds(  # type: ignore[no-untyped-def]
        x, packed, bias, offsets, sizes, probed, limits, k, max_bytes, differences, bfloat16
    ):
        return x.new_empty(x.shape[0], k), probed.new_empty(x.shape[0], k)

    @torch.library.register_fake("torch_ivf_module::exact_scores")
    def _exact_scores(x, packed, rows, differences):  # type: ignore[no-untyped-def]
        return x.new_empty(rows.shape)


STRATEGIES["native"] = Strategy(scan, exact_scores, bounds, serves)
