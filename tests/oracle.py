"""A float64 brute-force oracle, and the comparison of an index's answers with it.

Q queries, L lists, N stored vectors, d dim, k results.

Scores in this file are float64, and higher is better: the negated squared distance for l2, the inner product for ip,
the inner product of unit vectors for cosine. Answers are compared by score, so that ties may come in any order. A query
that is equally near to two lists, within float32 rounding, may probe either of them.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

RTOL = 1e-4  # promised for D
PRODUCT_ROUNDING = 2e-6  # error of a float32 inner product by cancellation, relative to |x| |v|
PROBE_ROUNDING = 3e-6  # relative difference of two lists' scores up to which they count as equally near
LARGEST = torch.finfo(torch.float32).max
SMALLEST = torch.finfo(torch.float32).tiny


class StoredRows(NamedTuple):
    """The contents of an index in float64, which the oracle searches."""

    ids: Tensor  # (N,)
    vectors: Tensor  # (N, d)
    lists: Tensor  # (N,) the list of each row


class Probed(NamedTuple):
    """Lists that a query must probe and lists that it may probe, bool (Q, L); they differ only by ties."""

    required: Tensor
    allowed: Tensor


class Reach(NamedTuple):
    """Rows that a query must read and rows that it may read, bool (Q, N)."""

    required: Tensor
    allowed: Tensor


def stored_rows(index: Any) -> StoredRows:
    """The contents of any kind of index, from its state_dict."""
    state = index.state_dict()
    rows = state.get("packed_embeddings")
    vectors = decoded(state["packed_codes"].cpu(), index.d) if rows is None else rows.cpu().double()
    ids = state["list_ids"].cpu()
    if "list_offsets" not in state:
        return StoredRows(ids, vectors, torch.zeros_like(ids))
    sizes = state["list_offsets"].cpu().diff()
    return StoredRows(ids, vectors, torch.repeat_interleave(torch.arange(len(sizes)), sizes))


def decoded(rows: Tensor, d: int) -> Tensor:
    """The vectors (N, d) of coded rows (N, W), whose values are float32."""
    content = rows.numpy()
    codes, ranges = content[:, :-8], np.frombuffer(content[:, -8:].tobytes(), "<f4").reshape(-1, 2)
    if codes.shape[1] != d:
        codes = np.stack([codes % 16, codes // 16], 2).reshape(len(codes), 2 * codes.shape[1])[:, :d]
    return torch.from_numpy(codes.astype(np.float32) * ranges[:, :1] + ranges[:, 1:]).double()


def unit(x: Tensor) -> Tensor:
    """Rows scaled to length one in float64; a zero row stays zero."""
    x = x.double()
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    return x / torch.where(norm > 0, norm, 1)


def comparable(x: Tensor, metric: str) -> Tensor:
    """Vectors as the metric compares them: rounded to float32, then in float64, at unit length for cosine."""
    return unit(x.float()) if metric == "cosine" else x.float().double()


def scores_of(queries: Tensor, vectors: Tensor, metric: str) -> Tensor:
    """Scores (Q, N), NaN where they overflow float32; `queries` and `vectors` are what `comparable` returns."""
    if metric == "l2":
        scores = -torch.cdist(queries, vectors, compute_mode="donot_use_mm_for_euclid_dist").square()
    else:
        scores = queries @ vectors.T
    return scores.masked_fill(~(scores.abs() <= LARGEST), torch.nan)


def tolerance(scores: Tensor, queries: Tensor, vectors: Tensor, metric: str) -> Tensor:
    """How far a float32 score may lie from the true one, (Q, N)."""
    allowed = RTOL * scores.abs() + SMALLEST
    if metric == "l2":
        return allowed
    return allowed + PRODUCT_ROUNDING * queries.norm(dim=1)[:, None] * vectors.norm(dim=1)


def list_scores(index: Any, queries: Tensor) -> tuple[Tensor, Tensor]:
    """Scores of the lists (Q, L), and the least difference (Q, 1) of two scores that is not due to rounding."""
    centroids = index.centroids.cpu().double()
    queries = comparable(queries, index.metric)
    if index.metric == "l2":
        scores = scores_of(queries, centroids, "l2")
        middle = centroids.mean(0)
        terms = (queries - middle).square().sum(1) + (centroids - middle).square().sum(1).max()
    else:
        scores = scores_of(queries, centroids, "ip")
        terms = queries.norm(dim=1) * centroids.norm(dim=1).max()
    return scores, PROBE_ROUNDING * terms[:, None]


def probed(index: Any, queries: Tensor, nprobe: int | None = None, max_codes: int | None = None) -> Probed:
    """The lists that each query probes, computed from the centroids."""
    scores, resolution = list_scores(index, queries)
    nlist = scores.shape[1]
    width = min(index.nprobe if nprobe is None else nprobe, nlist)
    if width == nlist:
        everything = torch.ones_like(scores, dtype=torch.bool)
        probed = Probed(everything, everything)
    else:
        best = scores.nan_to_num(-torch.inf).topk(width + 1, dim=1).values
        probed = Probed(scores > best[:, -1:] + resolution, scores >= best[:, -2:-1] - resolution)
    return probed if max_codes is None else _capped(index, scores, resolution, width, max_codes)


def _capped(index: Any, scores: Tensor, resolution: Tensor, width: int, max_codes: int) -> Probed:
    """The nearest lists that have at most `max_codes` rows together, and always the nearest one."""
    ordered, order = scores.sort(dim=1, descending=True)
    sizes = index.list_offsets.cpu().diff()[order[:, :width]]
    keep = sizes.cumsum(1) <= max_codes
    keep[:, :1] = True
    required = torch.zeros_like(scores, dtype=torch.bool).scatter_(1, order[:, :width], keep)
    # If the order of two lists is within rounding, other lists may be read. Such a query is not checked.
    clear = (-ordered[:, : width + 1].diff(dim=1) > resolution).all(1, keepdim=True)
    assert clear.double().mean() > 0.8, "the lists of too many queries are tied to check max_codes"
    return Probed(required & clear, required | ~clear)


def _reach(stored: StoredRows, probed: Probed | Reach) -> Reach:
    """A choice of lists (Q, L) as a choice of rows (Q, N)."""
    return probed if isinstance(probed, Reach) else Reach(*(lists[:, stored.lists] for lists in probed))


def _rows_of(ids: Tensor, stored: Tensor) -> tuple[Tensor, Tensor]:
    """The rows (Q, k, m) of the ids (Q, k) among the ids `stored` (N,), and which of these entries are rows.

    m is the largest number of rows of one id.
    """
    ordered, order = stored.sort()
    first, end = (torch.searchsorted(ordered, ids.contiguous(), right=right) for right in (False, True))
    position = first[:, :, None] + torch.arange(int((end - first).max()) if ids.numel() else 1)
    return order[position.clamp(max=len(order) - 1)], position < end[:, :, None]


def _at(values: Tensor, rows: Tensor) -> Tensor:
    """The entries of values (Q, N) at `rows` (Q, k, m)."""
    return values.gather(1, rows.flatten(1)).view_as(rows)


def _score(distances: Tensor, metric: str) -> Tensor:
    return -distances.cpu().double() if metric == "l2" else distances.cpu().double()


def check(
    found: tuple[Tensor, Tensor],
    queries: Tensor,
    stored: StoredRows,
    metric: str,
    k: int,
    lists: Probed | Reach | None = None,
    slack: Tensor | float = 0.0,
) -> None:
    """Assert that `found` (D, I) are the k best of the stored rows, or of the lists or rows that `lists` allows.

    `slack` (Q, 1) is by how much a result may be worse than the best, for a search that is approximate.
    """
    D, I = found
    assert D.shape == I.shape == (len(queries), k)
    assert D.dtype == torch.float32
    assert I.dtype == torch.int64
    queries = comparable(queries.cpu(), metric)
    got, ids, padding = _score(D, metric), I.cpu(), I.cpu() == -1

    # Padding is id -1 with the worst distance, and comes last. All other results are finite and sorted.
    assert torch.equal(got == -torch.inf, padding)
    assert not got.isnan().any()
    assert not (got == torch.inf).any()
    assert (got[:, 1:] <= got[:, :-1]).all()
    if metric == "l2":
        assert (D >= 0).all()

    scores = scores_of(queries, stored.vectors, metric)
    allowance = tolerance(scores, queries, stored.vectors, metric)
    usable = scores.isfinite()
    required = allowed = usable
    if lists is not None:
        required, allowed = (usable & rows for rows in _reach(stored, lists))

    if not stored.ids.numel():
        assert padding.all()
        return
    # Every result is a row that may be returned, at its true score, and no row is returned twice.
    rows, same = _rows_of(ids, stored.ids)
    same &= _at(allowed, rows)
    off = ((_at(scores, rows) - got[:, :, None]).abs() - _at(allowance, rows)).masked_fill(~same, torch.inf)
    wrong = ~padding & ~(off <= 0).any(2)
    assert not wrong.any(), f"wrong or impossible results at (query, rank) {wrong.nonzero().tolist()[:5]}"
    ordered = ids.sort(dim=1).values
    repeats = torch.searchsorted(ordered, ids, right=True) - torch.searchsorted(ordered, ids)
    assert ((repeats <= same.sum(2)) | padding).all(), "a row was returned twice"

    # The result at each rank is as good as the oracle's, and not better. If every score is within its allowance, then
    # so is the best of them, the second best, and so on.
    for rows, sign in ((required, 1), (allowed, -1)):
        missed = sign * (_best(scores - sign * allowance, rows, k) - got) > slack
        assert not missed.any(), f"not the k best at (query, rank) {missed.nonzero().tolist()[:5]}"


def _best(scores: Tensor, rows: Tensor, k: int) -> Tensor:
    """The k best scores among `rows` (Q, N), padded with -inf."""
    chosen = scores.masked_fill(~rows, -torch.inf)
    chosen = torch.cat([chosen, chosen.new_full((len(scores), k), -torch.inf)], dim=1)
    return chosen.topk(k, dim=1).values


def check_range(
    found: tuple[Tensor, Tensor, Tensor],
    queries: Tensor,
    stored: StoredRows,
    metric: str,
    radius: float,
    lists: Probed | Reach | None = None,
) -> int:
    """Assert that `found` (lims, D, I) holds the rows strictly inside `radius`; return how many those are."""
    lims, D, I = (part.cpu() for part in found)
    assert lims.dtype == I.dtype == torch.int64
    assert D.dtype == torch.float32
    assert lims.shape == (len(queries) + 1,)
    assert lims[0] == 0
    assert lims[-1] == len(D) == len(I)
    assert (lims.diff() >= 0).all()
    queries = comparable(queries, metric)
    scores = scores_of(queries, stored.vectors, metric)
    slack = tolerance(scores, queries, stored.vectors, metric)
    edge = -radius if metric == "l2" else radius
    assert (D < radius if metric == "l2" else D > radius).all()
    must, may = scores > edge + slack, scores > edge - slack
    if lists is not None:
        required, allowed = _reach(stored, lists)
        must, may = must & required, may & allowed

    # If no row of a query is on the radius, within rounding, its results are unambiguous: sorted by id and score, they
    # are the rows of the oracle.
    got, query_of = _score(D, metric), torch.repeat_interleave(torch.arange(len(queries)), lims.diff())
    clear = must.sum(1) == may.sum(1)
    hits = clear[query_of].nonzero()[:, 0]
    hits = hits[_lexicographic_order(got[hits], I[hits], query_of[hits])]
    of, rows = (may & clear[:, None]).nonzero(as_tuple=True)
    order = _lexicographic_order(scores[of, rows], stored.ids[rows], of)
    of, rows = of[order], rows[order]
    wrong = lims.diff() != may.sum(1)
    assert not (wrong & clear).any(), f"queries {wrong.nonzero()[:5, 0].tolist()}: a row is missing, or one too many"
    wrong = of[I[hits] != stored.ids[rows]]
    assert not len(wrong), f"query {wrong[0]}: a row is missing, or one too many"
    wrong = of[(got[hits] - scores[of, rows]).abs() > slack[of, rows]]
    assert not len(wrong), f"query {wrong[0]}: a result at a wrong distance"
    for q in (~clear).nonzero()[:, 0].tolist():
        hits = query_of == q
        _check_ambiguous(I[hits], got[hits], stored.ids, scores[q], slack[q], must[q], may[q], q)
    return len(I)


def _check_ambiguous(
    ids: Tensor, got: Tensor, stored: Tensor, scores: Tensor, slack: Tensor, must: Tensor, may: Tensor, q: int
) -> None:
    """Assert that the results of query q include all rows where `must` (N,), and only rows where `may` (N,)."""
    same = (ids[:, None] == stored) & may  # (results, N)
    near = (scores - got[:, None]).abs() <= slack
    assert (same & near).any(1).all(), f"query {q}: a result outside the radius, or at a wrong distance"
    assert ((ids[:, None] == ids).sum(1) <= same.sum(1)).all(), f"query {q}: a row was returned twice"
    needed = stored[must][:, None]
    enough = (needed == ids).sum(1) >= (needed == stored[must]).sum(1)
    assert enough.all(), f"query {q}: a row is missing"


def _lexicographic_order(*keys: Tensor) -> Tensor:
    """The order that sorts by the last key, then by the one before it, and so on, as numpy.lexsort."""
    order = torch.arange(len(keys[0]))
    for key in keys:
        order = order[key[order].argsort(stable=True)]
    return order


def agree(
    ours: tuple[Tensor, Tensor], theirs: tuple[Tensor, Tensor], rtol: float = RTOL, atol: float = 0.0
) -> None:
    """Assert that two answers are the same: equal distances, and equal ids up to the order of ties."""
    (D, I), (E, J) = ours, theirs
    torch.testing.assert_close(D, E, rtol=rtol, atol=atol)
    assert torch.equal(I == -1, J == -1)
    for q in (I != J).any(1).nonzero()[:, 0].tolist():
        _agree_on_one(D[q].tolist(), I[q].tolist(), E[q].tolist(), J[q].tolist(), rtol, atol, q)


def _agree_on_one(
    D: list[float], I: list[int], E: list[float], J: list[int], rtol: float, atol: float, q: int
) -> None:
    def tied(a: float, b: float) -> bool:
        return abs(a - b) <= 2 * (rtol * abs(b) + atol)

    for distances, ids, other_ids, other_distances in ((D, I, J, E), (E, J, I, D)):
        for distance, id in zip(distances, ids, strict=True):
            if id == -1:
                continue
            others = [other_distances[j] for j, other in enumerate(other_ids) if other == id]
            if ids.count(id) > len(others):  # of several rows with this id, one may be tied with the last result
                others += other_distances[-1:]
            assert any(tied(distance, other) for other in others), f"query {q}: id {id} is in one answer and not tied"

