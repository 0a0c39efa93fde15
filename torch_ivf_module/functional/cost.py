"""What a scan costs: the model behind search_mode="auto", and the scratch a scan needs.

Q queries, L lists, P probes, d dim, k results, W candidates a query.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .lists import InvertedLists, lengths
from .scan_lists import BLOCK, GROUP, SPAN
from .scan_queries import SLICE


class Costs(NamedTuple):
    """Nanoseconds on the device's threads together."""

    candidate: float  # query-major: find a candidate, add its bias, select
    candidate_dim: float  # query-major: one dimension of a candidate's product
    visit: float  # list-major: the calls that one list takes
    row_dim: float  # list-major: read one dimension of a visited row
    pair: float  # list-major: reduce one score
    pair_dim: float  # list-major: one dimension of a score's product
    fixed: float  # list-major: ordering the tasks and selecting, whatever the sizes


# Fitted to the sweep in docs/benchmarks.md on two x86-64 cores with AVX2.
_CPU = Costs(14.0, 0.15, 60_000.0, 0.2, 0.4, 0.0135, 500_000.0)
# Not measured: an accelerator pays for launches, of which list-major takes about ten a list.
_OTHER = Costs(0.2, 0.01, 100_000.0, 0.001, 0.001, 0.0001, 300_000.0)


def cheapest(lists: InvertedLists, probed: Tensor, k: int, width: int) -> str:
    """The strategy with the lower predicted time for this batch. Waits for the device once."""
    queries, dim = probed.shape[0], lists.packed.shape[1]
    price = _CPU if probed.device.type == "cpu" else _OTHER
    candidate = price.candidate + price.candidate_dim * dim
    by_query = queries * width * candidate
    if queries == 1:
        return "matrix"
    sizes = lengths(lists.offsets)
    visits = torch.bincount(probed.flatten() + 1, minlength=sizes.shape[0] + 1)[1:]
    seen = visits > 0
    visited, rows, pairs = torch.stack([seen.sum(), sizes[seen].sum(), (visits * sizes).sum()]).tolist()
    by_list = (
        price.fixed
        + visited * price.visit
        + rows * dim * price.row_dim
        + pairs * (price.pair + dim * price.pair_dim)
        + queries * k * GROUP * candidate
    )
    return "csr" if by_list < by_query else "matrix"


def scratch_bytes(mode: str, width: int, probes: int, k: int) -> int:
    """Scratch that one query takes, an upper bound within a factor of two."""
    if mode == "matrix":
        return 72 * min(width, SLICE) + 32 * probes
    blocks = width // SPAN + probes  # every list may waste part of a block
    return blocks * 4 * (BLOCK + 1) + 64 * probes + k * 64


def query_bytes(lists: int, probes: int, k: int) -> int:
    """Memory that a query takes outside the scan: its probes, its candidates, their exact scores."""
    return 32 * min(lists, probes) + 48 * k
