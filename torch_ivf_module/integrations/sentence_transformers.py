"""sentence-transformers' `semantic_search` over an index (extra `sentence-transformers`).

Q queries, n vectors, d dim.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from .._arrays import as_tensor
from ..index import IndexFlat
from ..index.base import IndexBase

__all__ = ["semantic_search"]

METRICS = {"cos_sim": "cosine", "dot_score": "ip"}


def semantic_search(
    query_embeddings: Tensor,
    corpus_embeddings: Tensor | IndexBase,
    query_chunk_size: int = 100,
    corpus_chunk_size: int = 500_000,
    top_k: int = 10,
    score_function: Callable[[Tensor, Tensor], Tensor] | None = None,
) -> list[list[dict[str, int | float]]]:
    """Find the `top_k` best of a corpus for each query, like `sentence_transformers.util.semantic_search`.

    Parameters
    ----------
    query_embeddings : (Q, d) or (d,).
    corpus_embeddings : (n, d), or an index of them, which is searched with its own metric and settings. Pass an index
        if the same corpus is searched more than once.
    query_chunk_size, corpus_chunk_size : have no effect; a search limits its memory by ``index.max_bytes``.
    score_function : `cos_sim` (the default) or `dot_score` of sentence_transformers.util. Leave it out for an index.

    Returns for each query a list of ``{"corpus_id": int, "score": float}``, best first. Raises ValueError for another
    score function, and for an index with metric "l2", whose distances are not similarities.

    >>> import torch
    >>> semantic_search(torch.tensor([0.0, 1.0]), torch.tensor([[1.0, 0.0], [0.0, 2.0]]), top_k=2)
    [[{'corpus_id': 1, 'score': 1.0}, {'corpus_id': 0, 'score': 0.0}]]
    """
    queries = as_tensor(query_embeddings, "query_embeddings")
    if not isinstance(corpus_embeddings, IndexBase):
        index: IndexBase = _indexed(as_tensor(corpus_embeddings, "corpus_embeddings"), score_function)
    elif score_function is None:
        index = corpus_embeddings
    else:
        raise ValueError("corpus_embeddings is an index, which has its own metric: leave score_function out")
    if index.metric == "l2":
        raise ValueError("corpus_embeddings must be an index of metric 'cosine' or 'ip', got one of metric 'l2'")
    queries = queries[None] if queries.dim() == 1 else queries
    D, I = index.search(queries.detach().to(index.device), top_k)
    return [
        [{"corpus_id": id, "score": score} for score, id in zip(scores, ids, strict=True) if id != -1]
        for scores, ids in zip(D.tolist(), I.tolist(), strict=True)
    ]


def _indexed(corpus: Tensor, score_function: Any) -> IndexFlat:
    name = "cos_sim" if score_function is None else getattr(score_function, "__name__", repr(score_function))
    if name not in METRICS:
        raise ValueError(f"score_function must be cos_sim or dot_score of sentence_transformers.util, got {name}")
    index = IndexFlat(corpus.shape[1], METRICS[name], device=corpus.device)
    index.add(corpus.detach())
    return index
