"""Comparing the ids of an inverted file with those of a reference, with distances computed independently of it.

N base vectors, whose ids are 0 .. N - 1; Q queries, d dim, L lists, P probed lists, k results.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .commands.common import say
from .index import IndexIVFFlat

__all__ = ["verify"]

CHECKED = 128  # queries that are compared with brute force


def distances(base: Tensor, queries: Tensor, ids: Tensor, metric: str) -> Tensor:
    """(Q, k) float64, lower is better, from the vectors that the ids name; +inf where the id is -1."""
    parts = []
    for q, rows in zip(queries.double().split(512), ids.split(512), strict=True):
        vectors = base[rows.clamp(min=0)].double()
        scores = (vectors - q[:, None]).square().sum(-1) if metric == "l2" else -(vectors @ q[..., None])[..., 0]
        parts.append(scores.masked_fill(rows < 0, torch.inf))
    return torch.cat(parts)


def brute_force(index: IndexIVFFlat, base: Tensor, queries: Tensor, lists: Tensor, k: int) -> Tensor:
    """ids (Q, k) of an exhaustive search of the probed lists (Q, P), in float64."""
    sizes, list_ids = index.list_sizes().cpu(), index.list_ids.cpu()
    list_of = torch.arange(index.nlist, device="cpu").repeat_interleave(sizes)
    found = torch.full((len(queries), k), -1)
    for row, query, probed in zip(found, queries, lists, strict=True):
        ids = list_ids[torch.isin(list_of, probed)]
        best = distances(base, query[None], ids[None], index.metric)[0].topk(min(k, len(ids)), largest=False).indices
        row[: len(best)] = ids[best]
    return found


def same_answers(base: Tensor, queries: Tensor, metric: str, ids: Tensor, reference: Tensor) -> Tensor:
    """(Q,) bool: the same ids, or others whose distances agree to float32 rounding; no id twice.

    Both sides' distances are computed again from the ids, so that a right distance with a wrong id is found.
    """
    ours, theirs = (distances(base, queries, found, metric).sort(-1).values for found in (ids, reference))
    tolerance = 1e-4 * theirs.abs() + 1e-6 * queries.double().square().sum(-1, keepdim=True)
    close = (ours == theirs) | ((ours - theirs).abs() <= tolerance)  # the first: inf equals inf
    ordered = ids.sort(-1).values
    twice = (ordered[:, 1:] == ordered[:, :-1]) & (ordered[:, 1:] >= 0)
    return close.all(-1) & ~twice.any(-1)


def verify(index: IndexIVFFlat, base: Tensor, queries: Tensor, answers: dict[int, list[Tensor]]) -> bool:
    """Whether our ids at every nprobe are faiss's, or those of brute force where there is no faiss; ties aside.

    `answers` has for every nprobe our ids (Q, k) and, where faiss is installed, faiss's. Prints a line for each.
    """
    compared = len(next(iter(answers.values()))) == 2
    name = "faiss" if compared else "brute force over the probed lists"
    queries = queries if compared else queries[:CHECKED]
    q, centroids = queries.double(), index.centroids.cpu().double()
    far, lists = (torch.cdist(q, centroids).square() if index.metric == "l2" else -(q @ centroids.T)).sort(-1)
    correct = True
    for nprobe, (ids, *theirs) in answers.items():
        ids = ids[: len(queries)]
        reference = theirs[0] if compared else brute_force(index, base, queries, lists[:, :nprobe], ids.shape[1])
        differ = ~same_answers(base, queries, index.metric, ids, reference)
        # Where the last probed list and the next are equally far, rounding chooses; in float32 it grows with q·q.
        rounding = 1e-5 * far[:, nprobe - 1].abs() + 1e-6 * q.square().sum(-1)
        tied = far[:, nprobe : nprobe + 1] - far[:, nprobe - 1 : nprobe] <= rounding[:, None]
        tied = differ & tied.any(-1)
        wrong = int((differ & ~tied).sum())
        text = f"nprobe {nprobe}: {len(queries) - int(differ.sum()):,} of {len(queries):,} queries as {name}"
        text += f", {int(tied.sum())} differ in a tied last list" if tied.any() else ""
        say("verify", text + (f", {wrong} WRONG" if wrong else ""))
        correct = correct and not wrong
    return correct
