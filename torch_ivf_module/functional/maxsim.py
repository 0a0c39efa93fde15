"""Late interaction: a document scores the sum, over the tokens of a query, of the maximum product with its rows.

Q queries, T tokens per query, d dim, N rows, M documents, C candidate documents per query, W rows of the longest one.
Scores are inner products; of rows and queries at unit length they are cosines. A *number* is a position among the M
documents; an *id* is the user's label of a document.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from .row_codes import Rows, as_float, rows_at

# Bytes of rows and of their scores at a time: 4 MiB stay in cache until the maxima are taken.
_BLOCK_BYTES = 4 << 20


class Documents(NamedTuple):
    """The rows of each document: ``rows[starts[m] : starts[m] + sizes[m]]`` of number m. Each has at least one row."""

    ids: Tensor  # (M,) int64, ascending
    rows: Tensor  # (N,) int64
    starts: Tensor  # (M,) int64
    sizes: Tensor  # (M,) int64


def documents_of(ids: Tensor) -> Documents:
    """The documents of rows whose document ids are `ids` (N,).

    >>> documents_of(torch.tensor([7, 3, 7])).rows
    tensor([1, 0, 2])
    """
    ordered, rows = torch.sort(ids, stable=True)
    # Copies: the results of torch are views of tensors with an entry for each row.
    values, sizes = (part.clone() for part in torch.unique_consecutive(ordered, return_counts=True))
    return Documents(values, rows, sizes.cumsum(0) - sizes, sizes)


def numbers_of(documents: Documents, ids: Tensor) -> Tensor:
    """The numbers of document ids, of any shape; -1 for an id that no document has."""
    if documents.ids.shape[0] == 0:
        return torch.full_like(ids, -1)
    at = torch.searchsorted(documents.ids, ids).clamp_(max=documents.ids.shape[0] - 1)
    return torch.where(documents.ids[at] == ids, at, -1)


def rows_of(documents: Documents, numbers: Tensor, width: int) -> Tensor:
    """The rows (..., width) of documents by number (...), of at most `width` rows; the last row is repeated."""
    at = torch.minimum(torch.arange(width, device=numbers.device), documents.sizes[numbers][..., None] - 1)
    return documents.rows[documents.starts[numbers][..., None] + at]


def products(tokens: Tensor, packed: Rows, rows: Tensor) -> Tensor:
    """Products (Q, C, W, T) of tokens (Q, T, d) with the packed rows at `rows` (Q, C, W)."""
    d = tokens.shape[2]
    vectors = as_float(rows_at(packed, rows.flatten()), d).view(rows.shape[0], rows.shape[1] * rows.shape[2], d)
    return torch.bmm(vectors, tokens.transpose(1, 2)).unflatten(1, rows.shape[1:])


def estimates(numbers: Tensor, scores: Tensor, weights: Tensor, count: int) -> Tensor:
    """Estimated scores (Q, M) of all M = `count` documents, less a term that depends on the query alone.

    `numbers` and `scores` (Q, T, K) are the documents of the best rows of each token, best first, -1 for padding;
    `weights` (Q, T) are 1 for tokens, 0 for padding. A token without a row of a document counts as the last score that
    was found for it, which is an upper bound if all lists were probed (XTR, arXiv:2304.01982; WARP, arXiv:2501.17788).

    >>> estimates(torch.tensor([[[0, 1, 0]]]), torch.tensor([[[5.0, 4.0, 3.0]]]), torch.ones(1, 1), 3)
    tensor([[2., 1., 0.]])
    """
    padding = numbers < 0
    least = scores.masked_fill(padding, torch.inf).amin(2, keepdim=True)
    excess = (scores - least).masked_fill(padding, 0)
    # Of several rows of one document the best stays first. (ONNX has no stable sort.)
    each = numbers.shape[2]
    keys = torch.sort((numbers + 1) * each + torch.arange(each, device=numbers.device), dim=2).values
    numbers = keys // each - 1
    at = keys - (numbers + 1) * each
    again = torch.nn.functional.pad(numbers[:, :, 1:] == numbers[:, :, :-1], (1, 0))
    excess = excess.gather(2, at).masked_fill(again, 0) * weights[:, :, None]
    total = torch.zeros(numbers.shape[0], count, dtype=torch.float32, device=numbers.device)
    return total.scatter_add(1, numbers.clamp(min=0).flatten(1), excess.flatten(1))


def score_all(tokens: Tensor, weights: Tensor, packed: Rows, documents: Documents, max_bytes: int) -> Tensor:
    """Scores (Q, M) of all documents for tokens (Q, T, d) with weights (Q, T). Synchronizes with the device."""
    sizes, order = torch.sort(documents.sizes, descending=True, stable=True)
    queries = tokens.flatten(0, 1)[None]
    scores = torch.empty(tokens.shape[0], order.shape[0], device=tokens.device)
    for part, width in _blocks(sizes, 4 * (tokens.shape[2] + queries.shape[1]), max_bytes):
        found = products(queries, packed, rows_of(documents, order[None, part], width))[0].amax(1)
        scores[:, order[part]] = torch.einsum("mqt,qt->qm", found.unflatten(1, weights.shape), weights)
    return scores


def score_candidates(
    tokens: Tensor, weights: Tensor, packed: Rows, documents: Documents, numbers: Tensor, max_bytes: int
) -> tuple[Tensor, Tensor]:
    """Scores (Q, C) of candidate documents by number (Q, C), and for each the best row of each token (Q, C, T).

    Synchronizes with the device.
    """
    sizes, order = torch.sort(documents.sizes[numbers], dim=1, descending=True, stable=True)
    ordered = numbers.gather(1, order)
    scores = torch.empty(numbers.shape, device=tokens.device)
    best = torch.empty(*numbers.shape, tokens.shape[1], dtype=torch.int64, device=tokens.device)
    row_bytes = 4 * sum(tokens.shape[1:]) * max(1, numbers.shape[0])
    for part, width in _blocks(sizes.amax(0) if sizes.shape[0] else sizes[:0, 0], row_bytes, max_bytes):
        found, rows = score_documents(tokens, weights, packed, documents, ordered[:, part], width)
        scores.scatter_(1, order[:, part], found)
        best.scatter_(1, order[:, part, None].expand_as(rows), rows)
    return scores, best


def score_documents(
    tokens: Tensor, weights: Tensor, packed: Rows, documents: Documents, numbers: Tensor, width: int
) -> tuple[Tensor, Tensor]:
    """`score_candidates` for documents of at most `width` rows, in operations of static shapes."""
    rows = rows_of(documents, numbers, width)
    values, at = products(tokens, packed, rows).max(2)
    return torch.einsum("qct,qt->qc", values, weights), rows.gather(2, at)


def _blocks(sizes: Tensor, row_bytes: int, max_bytes: int) -> Iterator[tuple[slice, int]]:
    """Slices of documents of descending `sizes` (M,), and the most rows of one in each: at least one document, else as
    many as are `max_bytes`, or a cache, if a row takes `row_bytes`."""
    rows, widths, begin = min(max_bytes, _BLOCK_BYTES) // row_bytes, sizes.tolist(), 0
    while begin < len(widths):
        end = begin + max(1, rows // widths[begin])
        yield slice(begin, end), widths[begin]
        begin = end


def differentiable_scores(tokens: Tensor, weights: Tensor, packed: Rows, rows: Tensor) -> Tensor:
    """Scores (Q, k) of documents whose best rows are `rows` (Q, k, T), differentiable in tokens (Q, T, d)."""
    vectors = as_float(rows_at(packed, rows.flatten()), tokens.shape[2]).view(*rows.shape, tokens.shape[2])
    return torch.einsum("qtd,qktd,qt->qk", tokens, vectors, weights)
