"""Kernels written for a device: the protocol they implement, and their registry.

Q queries, L lists, P probes, N vectors, d dim, k results, H hits.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from torch import Tensor

from .lists import InvertedLists

# The k best rows of the probed lists by ranking score, scores and rows (Q, at most k): takes queries x (Q, d) relative
# to the origin, lists, probed (Q, P), the rows to read of each (Q, P) or None, k, the most rows that a query reads, and
# the workspace in bytes.
Scan = Callable[[Tensor, InvertedLists, Tensor, Tensor | None, int, int, int], tuple[Tensor, Tensor]]


class Kernel(Protocol):
    """An implementation for one device. Every method gives what the PyTorch operations give, up to rounding."""

    def available(self, x: Tensor) -> bool:
        """Whether it can be used now, for queries (Q, d) of this device and dtype."""

    def serves(self, vectors: Tensor) -> bool:
        """Whether it supports the dtype, layout and number of these stored vectors (N, d)."""

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
        """The k best rows of the probed lists by exact score: scores and rows (Q, k), and which queries (Q,) took a
        second pass or, for ip and cosine, have products that overflow. x is *not* relative to the origin; exact scores
        are taken of `kept` candidates a query."""

    def above(self, x: Tensor, lists: InvertedLists, probed: Tensor, threshold: Tensor) -> tuple[Tensor, Tensor]:
        """The rows of the probed lists with a ranking score above threshold (Q,): lims (Q + 1,) and rows (H,).

        x (Q, d) is relative to the origin."""

    def nearest(self, x: Tensor, vectors: Tensor, bias: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """The k vectors (N, d) of highest ranking score: scores and rows (Q, k), best first."""


KERNELS: list[Kernel] = []  # native/ adds its own


def kernel_for(x: Tensor) -> Kernel | None:
    """The kernel for queries x (Q, d), None if there is none. Selected once per search; never while tracing."""
    for kernel in KERNELS:
        if kernel.available(x):
            return kernel
    return None
