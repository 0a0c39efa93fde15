"""Whether the answers are right: brute force, recall, and agreement of ids modulo ties.

All scores are float64 from the original rows, higher is better; B rows checked, N base rows, k results.
"""

from typing import Any

import numpy as np
import torch

_MARGIN = 32  # candidates kept beyond k when float32 chooses them and float64 orders them
_TIE = 1e-6  # scores this close, relative to the norms they are made of, count as a tie


def brute_force(base: np.ndarray, queries: np.ndarray, k: int, metric: str) -> np.ndarray:
    """The true ids (B, k), best first."""
    x = torch.from_numpy(base)
    bias = (x * x).sum(1) / 2 if metric == "l2" else 0
    parts, most = torch.from_numpy(queries).split(64), min(k + _MARGIN, x.shape[0])
    ids = torch.cat([(part @ x.T - bias).topk(most).indices for part in parts]).numpy()
    order = np.argsort(-scores_of(base, queries, ids, metric), axis=1, kind="stable")[:, :k]
    return np.take_along_axis(ids, order, axis=1)


def scores_of(base: np.ndarray, queries: np.ndarray, ids: np.ndarray, metric: str) -> np.ndarray:
    """Exact scores (B, k) of `ids` (B, k); -inf where the id is -1."""
    scores = np.empty(ids.shape, dtype=np.float64)
    for i, (query, row) in enumerate(zip(queries.astype(np.float64), ids, strict=True)):
        rows = base[row].astype(np.float64)
        scores[i] = -((rows - query) ** 2).sum(1) if metric == "l2" else rows @ query
    scores[ids < 0] = -np.inf
    return scores


def recall(base: np.ndarray, queries: np.ndarray, ids: np.ndarray, truth: np.ndarray, metric: str) -> float:
    """The share of the true k neighbours that came back; a tie with the k-th counts as found."""
    kth = scores_of(base, queries, truth[:, -1:], metric) - _tolerance(base, queries, metric)
    return float(((scores_of(base, queries, ids, metric) >= kth) & ~_repeated(ids)).mean())


def agreement(base: np.ndarray, queries: np.ndarray, ids: np.ndarray, other: np.ndarray, metric: str) -> float:
    """The share of `ids` (B, k) that `other` (B, k) holds too, or that tie with the last of `other`."""
    with np.errstate(invalid="ignore"):  # -inf minus -inf, where both ran out of candidates
        distance = np.abs(scores_of(base, queries, ids, metric) - scores_of(base, queries, other[:, -1:], metric))
    ties = (distance <= _tolerance(base, queries, metric)) & (ids >= 0)
    same = (ids[:, :, None] == other[:, None, :]).any(2)
    return float(((same | ties) & ~(_repeated(ids) & (ids >= 0))).mean())


def _tolerance(base: np.ndarray, queries: np.ndarray, metric: str) -> Any:
    """(B, 1): the float32 rounding that a score of these rows may carry."""
    longest, norms = np.square(base).sum(1).max(), np.square(queries).sum(1)[:, None]
    return _TIE * (norms + longest if metric == "l2" else np.sqrt(norms * longest))


def _repeated(ids: np.ndarray) -> np.ndarray:
    """True where a row names an id a second time."""
    return np.array([[id in row[:i] for i, id in enumerate(row)] for row in ids.tolist()])
