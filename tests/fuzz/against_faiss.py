"""Comparison with faiss, on data for which its float32 arithmetic is accurate.

Q queries, N rows, d dim, k results.
"""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor

from tests.fuzz.model import Model
from tests.oracle import agree, comparable
from torch_ivf_module import SearchParams, to_faiss

with warnings.catch_warnings():
    warnings.simplefilter("ignore", DeprecationWarning)  # its SWIG wrappers raise some on import
    import faiss

RTOL = 1e-3
ROUNDING = 1e-6  # of the squared norms, for faiss computes distances of many queries from products


def check_flat(index: Any, model: Model, x: Tensor, k: int) -> None:
    """Compare a search of all lists with faiss's exhaustive search of the rows of the model."""
    theirs = faiss.IndexFlat(model.d, faiss.METRIC_L2 if model.metric == "l2" else faiss.METRIC_INNER_PRODUCT)
    theirs.add(model.stored.float().numpy())
    E, J = theirs.search(comparable(x, model.metric).float().numpy(), k)
    rows = torch.from_numpy(J)
    ids = torch.cat([model.ids, torch.tensor([-1])])[rows]
    ours = index.search(x, k, params=SearchParams(nprobe=1 << 30) if model.centroids is not None else None)
    _agree(ours, (torch.from_numpy(E), ids), model, x)


def check_same_lists(index: Any, model: Model, x: Tensor, k: int, nprobe: int) -> None:
    """Compare the index with `to_faiss` of it, for queries whose nearest lists are not tied."""
    reach = model.reach(x, nprobe)
    x = x[(reach.required == reach.allowed).all(1)]
    theirs = to_faiss(index)
    if model.centroids is not None:
        faiss.extract_index_ivf(theirs).nprobe = nprobe
    E, J = theirs.search(x.float().numpy(), k)
    ours = index.search(x, k, params=SearchParams(nprobe=nprobe))
    _agree(ours, (torch.from_numpy(E), torch.from_numpy(J)), model, x)


def _agree(ours: tuple[Tensor, Tensor], theirs: tuple[Tensor, Tensor], model: Model, x: Tensor) -> None:
    D, I = ours
    E, J = theirs
    E = torch.where(J == -1, torch.inf if model.metric == "l2" else -torch.inf, E)  # faiss pads with the largest float
    size = comparable(x, model.metric).square().sum(1).amax() if len(x) else 0.0
    size = float(size + (model.stored.double().square().sum(1).amax() if model.n else 0.0))
    agree((D, I), (E, J), rtol=RTOL, atol=ROUNDING * size)
