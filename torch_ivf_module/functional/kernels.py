"""The place for kernels written for a device: what one may do for a search in the stead of PyTorch operations.

Q queries, L lists, P probes, N vectors, d dim, k results, K candidates a query.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from torch import Tensor

from .lists import InvertedLists
from .parts import tracing

# The k best rows of the probed lists, scores and rows (Q, at most k): by queries x (Q, d) relative to the origin,
# lists, probed (Q, P), perhaps the rows to read of each, k, the most rows that a query reads, and scratch in bytes.
Scan = Callable[[Tensor, InvertedLists, Tensor, Tensor | None, int, int, int], tuple[Tensor, Tensor]]


class Kernel(Protocol):
    """What a device has of its own. All of it gives what the PyTorch operations give, but for rounding."""

    def serves(self, x: Tensor, vectors: Tensor) -> bool:
        """Whether it is there for such queries (Q, d) and stored vectors (N, d)."""

    @property
    def scan(self) -> Scan:
        """Its `Scan`."""

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
        """A scan that gives, instead of scores, what the exact score of a row does not exceed; None where that does not
        pay. x is *not* relative to the origin. The last bound of a query is infinite if nothing can be said of it."""

    def exact_scores(self, x: Tensor, packed: Tensor, rows: Tensor, metric: str) -> Tensor:
        """Exact scores (Q, K) of rows (Q, K) of `packed` (N, d), -inf for a row of -1."""

    def above(self, x: Tensor, lists: InvertedLists, probed: Tensor, floor: Tensor) -> tuple[Tensor, Tensor]:
        """Queries and rows (H,) of the probed lists with a ranking score above floor (Q,)."""

    def nearest(self, x: Tensor, vectors: Tensor, bias: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """The k vectors (N, d) of highest ranking score: scores and rows (Q, k), best first."""


KERNELS: list[Kernel] = []  # native/ adds its own


def kernel_for(x: Tensor, vectors: Tensor) -> Kernel | None:
    """The kernel for such queries and vectors, None where there is none and in a graph."""
    if tracing():
        return None
    return next((kernel for kernel in KERNELS if kernel.serves(x, vectors)), None)
