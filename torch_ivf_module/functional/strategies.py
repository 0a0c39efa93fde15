"""The search modes, and which scan a search uses.

Q queries, d dim.
"""

from __future__ import annotations

from torch import Tensor

from .cost import cheapest
from .kernels import Scan, scan_for
from .lists import InvertedLists
from .options import Probes, SearchOptions
from .scan_lists import scan_lists
from .scan_queries import scan_queries

STRATEGIES: dict[str, Scan] = {"csr": scan_lists, "matrix": scan_queries}
MODES = ("auto", *STRATEGIES)


def strategy(
    probes: Probes, shifted: Tensor, lists: InvertedLists, options: SearchOptions, count: int, width: int
) -> tuple[str, str, Scan]:
    """The mode, why it was chosen, and the scan, for `count` candidates of the at most `width` rows of a query.

    `shifted` (Q, d) are the queries relative to the origin.
    """
    mode, why = options.mode, "search_mode"
    if mode == "auto":
        kernel = scan_for(shifted, lists.packed)
        if kernel is not None:
            return kernel.name, "TORCH_IVF_TRITON=1", kernel
        mode, why = cheapest(shifted, lists, probes.lists, probes.limits, count, width)
    return mode, why, STRATEGIES[mode]
