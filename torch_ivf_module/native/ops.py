"""The operators in C++ as a `functional.kernels.Kernel`.

Q queries, L lists, P probes, N vectors, d dim, k results, H hits.
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
_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
_WORKSPACE = 64 << 20  # bytes for finding the nearest of some vectors


class NativeKernel:
    """Calls of the operators, whose arguments must be contiguous."""

    def available(self, x: Tensor) -> bool:
        """Whether it can be used now, for queries (Q, d) of this device and dtype."""
        return x.is_cpu and x.dtype == torch.float32 and library.available()

    def serves(self, vectors: Tensor) -> bool:
        """Whether it takes such stored vectors (N, d)."""
        return vectors.dtype in _DTYPES and vectors.is_contiguous() and vectors.shape[0] < _MOST_ROWS

    def search(
        self,
        x: Tensor,
        origin: Tensor,
        lists: InvertedLists,
        probed: Tensor,
        limits: Tensor | None,
        k: int,
        kept: int,
        metric: str,
        max_bytes: int,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The k best rows of the probed lists by exact score, and which queries took a second pass."""
        kept = max(k, min(kept, lists.packed.shape[0] + 1))
        x, limits = x.contiguous(), None if limits is None else limits.contiguous()
        held = lists.packed, lists.bias, lists.offsets, lists.sizes
        rest = probed.contiguous(), limits, k, kept, metrics.by_differences(metric), max_bytes
        return _call("search_lists", x, origin, *held, *rest)

    def above(self, x: Tensor, lists: InvertedLists, probed: Tensor, threshold: Tensor) -> tuple[Tensor, Tensor]:
        """The rows of the probed lists with a ranking score above threshold (Q,): lims (Q + 1,) and rows (H,)."""
        held = lists.packed, lists.bias, lists.offsets, lists.sizes
        return _call("scan_above", x.contiguous(), *held, probed.contiguous(), threshold.contiguous())

    def nearest(self, x: Tensor, vectors: Tensor, bias: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """The k vectors (N, d) of highest ranking score: scores and rows (Q, k), best first."""
        offsets = torch.tensor([0, vectors.shape[0]], device=x.device)
        lists = offsets, offsets.flip(0), offsets.new_zeros(x.shape[0], 1)  # one list, which every query visits
        return _call("scan", x.contiguous(), vectors, bias, *lists, None, k, _WORKSPACE)


def _call(name: str, *arguments: Any) -> Any:
    return getattr(torch.ops.torch_ivf_module, name)(*arguments)


KERNELS.append(NativeKernel())
