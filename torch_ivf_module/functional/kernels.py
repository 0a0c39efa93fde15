"""Kernels written for a device: the protocol they implement, and their registry.

Q queries, L lists, P probes, N vectors, d dim, k results, H hits.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Protocol

from torch import Tensor

from .codec import Codes
from .lists import InvertedLists

if TYPE_CHECKING:
    from .filters import Filter
    from .probe import Coarse

# The k best rows of the probed lists by ranking score, scores and rows (Q, at most k): takes queries x (Q, d) relative
# to the origin, lists, probed (Q, P), the rows to read of each (Q, P) or None, k, the most rows that a query reads, and
# the workspace in bytes.
Scan = Callable[[Tensor, InvertedLists, Tensor, Tensor | None, int, int, int], tuple[Tensor, Tensor]]


class Kernel(Protocol):
    """An implementation for one device. Every method returns what the PyTorch operations return, up to rounding."""

    def available(self, x: Tensor) -> bool:
        """Whether it can be used now, for queries (Q, d) of this device and dtype."""

    def serves(self, vectors: Tensor) -> bool:
        """Whether it supports the dtype, layout and number of these stored vectors (N, d)."""

    def probe(self, x: Tensor, coarse: Coarse, nprobe: int, metric: str) -> tuple[Tensor, Tensor]:
        """The nearest lists of finite queries x (Q, d), nearest first: exact scores and lists (Q, min(nprobe, L)).

        Exact also where float32 scores are rounded or overflow. x is *not* relative to the origin."""

    def multiplies_codes(self) -> bool:
        """Whether it has fast products of 8-bit integers, so that a search with codes takes less time."""

    def encode(self, lists: InvertedLists, d: int) -> Codes | None:
        """The codes of all rows of the lists, None if d is too large; ``serves(lists.packed)`` must be true."""

    def filters(self) -> bool:
        """Whether `search` takes a filter for each query."""

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
        filter: Filter | None,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """A whole search of one or two segments: scores, rows and ids (Q, k), which queries (Q,) took a second pass or,
        for ip and cosine, have products that overflow, and how many rows of each were scored exactly, (Q,) int64.

        x (Q, d) is *not* relative to the origin; a query that is not finite has no results. Each query reads the lists
        `probed` (Q, P) and of each at most `limits` (Q, P) rows, counted over all segments in their order, None for all
        rows. If `probed` is None, it reads the `nprobe` nearest lists, within `max_codes`. `kept` candidates per query
        are scored exactly. If there are `codes` of the first segment, whose bias may be another than that of the lists
        that were encoded, its rows are excluded by their codes. Rows that a filter excludes are as if they
        were not there; there is one only if `filters` says so."""

    def cells(self, probed: Tensor, groups: Tensor, cells: Sequence[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """What `cells.cells_probed` returns of the fields of `Cells`: offsets, sizes, and the lists (Q, P) to read."""

    def above(self, x: Tensor, lists: InvertedLists, probed: Tensor, threshold: Tensor) -> tuple[Tensor, Tensor]:
        """The rows of the probed lists with a ranking score above threshold (Q,): lims (Q + 1,) and rows (H,).

        x (Q, d) is relative to the origin."""

    def nearest(self, x: Tensor, vectors: Tensor, bias: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """The k vectors (N, d) of highest ranking score: scores and rows (Q, k), best first."""


class ScanKernel(Protocol):
    """A kernel that is a scan alone, for the steps around which PyTorch operations will do."""

    name: str  # the mode in the stats

    def serves(self, x: Tensor, packed: Tensor) -> bool:
        """Whether it is to be used for queries x (Q, d) and stored rows (N, W)."""

    def __call__(
        self, x: Tensor, lists: InvertedLists, probed: Tensor, limits: Tensor | None, k: int, width: int, max_bytes: int
    ) -> tuple[Tensor, Tensor]:
        """See `Scan`."""


KERNELS: list[Kernel] = []  # native/ adds its own
SCANS: list[ScanKernel] = []  # gpu/ adds its own


def kernel_for(x: Tensor) -> Kernel | None:
    """The kernel for queries x (Q, d), or None. Called once per search; not for graphs, which cannot record kernels."""
    for kernel in KERNELS:
        if kernel.available(x):
            return kernel
    return None


def scan_for(x: Tensor, packed: Tensor) -> ScanKernel | None:
    """The kernel that scans stored rows (N, W) for queries x (Q, d) in search_mode="auto", or None."""
    return next((scan for scan in SCANS if scan.serves(x, packed)), None)
