"""The query-major scan, "matrix": each query's own candidates as one row of a rectangle.

Q queries, P probes, W candidates a query, d dim, k results. Shapes depend on `width` alone, so that the same
functions serve model graphs.
"""

from __future__ import annotations

import functools
import warnings

import torch
from torch import Tensor

from .lists import InvertedLists, lengths, ranges_to_positions
from .select import NEVER, best_positions, select_topk

SLICE = 1 << 18  # candidates of a query held at a time
_SPLIT_ROWS = 16  # pattern rows that keep two to eight threads evenly busy
_GATHER_BYTES = 32 << 20  # vectors gathered at a time where there is no fused gather-and-dot


def scan_queries(x: Tensor, lists: InvertedLists, probed: Tensor, k: int, width: int) -> tuple[Tensor, Tensor]:
    """The k best rows of the probed lists: ranking scores and rows (Q, min(k, width)).

    x (Q, d) relative to the origin; probed (Q, P), -1 where nothing is probed; `width` at least the largest
    number of rows that a query's lists hold together.
    """
    parts = []
    for start in range(0, width, SLICE):
        rows = candidate_rows(lists.offsets, probed, start, min(SLICE, width - start))
        parts.append(best_rows(x, lists, rows, k))
    if len(parts) == 1:
        return parts[0]
    return select_topk(torch.cat([p[0] for p in parts], 1), torch.cat([p[1] for p in parts], 1), min(k, width))


def candidate_rows(offsets: Tensor, probed: Tensor, start: int, width: int) -> Tensor:
    """Candidates ``start : start + width`` of each query (Q, width): the rows of its lists (Q, P), -1 behind them."""
    at = probed.clamp(min=0)
    sizes = lengths(offsets)[at].masked_fill(probed < 0, 0)
    first = offsets[at]
    if start:
        skipped = torch.minimum((start - (sizes.cumsum(1) - sizes)).clamp(min=0), sizes)
        first, sizes = first + skipped, sizes - skipped
    return ranges_to_positions(first, sizes, width)[0]


def best_rows(x: Tensor, lists: InvertedLists, rows: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k best of the candidate rows (Q, W): ranking scores and rows (Q, min(k, W))."""
    best, at = best_positions(score_rows(x, lists, rows), k)
    return best, rows.gather(1, at).masked_fill(best == NEVER, -1)


def score_rows(x: Tensor, lists: InvertedLists, rows: Tensor) -> Tensor:
    """Ranking scores (Q, W) of the rows (Q, W) for x (Q, d); -inf for padding and for what is no number."""
    at = rows.clamp(min=0)
    if lists.bias.shape[0]:
        start = lists.bias.index_select(0, at.flatten()).view(rows.shape)
    else:
        start = torch.zeros(rows.shape, device=x.device)
    start = start.masked_fill_(rows < 0, NEVER)
    if rows.numel() and _has_sampled_product(x, lists.packed, rows.shape[1]):
        scores = _sampled_product(x, lists.packed, at, start)
    else:
        scores = start + _gathered_product(x, lists.packed, at)
    return scores.nan_to_num_(nan=NEVER, posinf=NEVER, neginf=NEVER)


def _gathered_product(x: Tensor, packed: Tensor, rows: Tensor) -> Tensor:
    step = max(1, _GATHER_BYTES // max(1, 4 * rows.shape[1] * packed.shape[1]))
    parts = [
        torch.bmm(packed[part].float(), query[:, :, None])[:, :, 0]
        for query, part in zip(x.split(step), rows.split(step), strict=True)
    ]
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _has_sampled_product(x: Tensor, packed: Tensor, width: int) -> bool:
    # A CSR row longer than the matrix is wide, as padding can make it in a tiny index, is not allowed.
    return packed.device.type == "cpu" and packed.dtype == x.dtype == torch.float32 and width <= packed.shape[0]


def _sampled_product(x: Tensor, packed: Tensor, rows: Tensor, start: Tensor) -> Tensor:
    """``start + <x, packed[rows]>`` without gathering: a product sampled at the pattern of a CSR matrix.

    It runs one thread a row of the pattern, so a few queries are split into several rows each: 32,000 candidates
    of one query take 1.1 ms as one row and 0.6 ms as two or more on two threads.
    """
    queries, width = rows.shape
    split = max(1, min(_SPLIT_ROWS // queries, width))
    cuts = torch.arange(split) * width // split
    ends = (torch.arange(queries)[:, None] * width + cuts).flatten()
    ends = torch.nn.functional.pad(ends, (0, 1), value=rows.numel())
    _silence_sparse_notices()
    pattern = torch.sparse_csr_tensor(
        ends, rows.flatten(), start.flatten(), size=(queries * split, packed.shape[0]), check_invariants=False
    )
    x = x if split == 1 else x.repeat_interleave(split, 0)
    torch.sparse.sampled_addmm(pattern, x, packed.t(), out=pattern)
    return pattern.values().view(queries, width)


@functools.cache
def _silence_sparse_notices() -> None:
    """PyTorch says once a process that CSR tensors are in beta; say it to nobody."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.sparse_csr_tensor([0, 1], [0], [1.0], size=(1, 1))
