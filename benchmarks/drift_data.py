"""Vectors whose distribution changes from the first to the last, for benchmarks/drift.py, and queries.

N vectors, Q queries, d dim, k results.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from torch_ivf_module import IndexFlat
from torch_ivf_module.photographs import photograph_patches

K, QUERIES = 10, 2000


def clusters(n: int) -> Tensor:
    """Rows (N, 64) around 2,000 centres, of which a quarter is in use at a time: others as time passes."""
    generator, centres = torch.Generator().manual_seed(0), 2000
    places = torch.randn(centres, 64, generator=generator)
    at = torch.linspace(0, 0.75, n) + 0.25 * torch.rand(n, generator=generator)
    chosen = (at * centres).long().clamp(max=centres - 1)
    return places[chosen] + 0.5 * torch.randn(n, 64, generator=generator)


def photographs(n: int) -> Tensor:
    """Patches (N, 192) of two photographs, roughly in the order of their second principal component."""
    x = torch.from_numpy(np.asarray(photograph_patches(n, 1)[0])).float()
    x = x - x.mean(0)
    component = torch.linalg.eigh(x.T @ x).eigenvectors[:, -2]
    component *= component[component.abs().argmax()].sign()
    place = (x @ component).argsort().argsort() / n
    return x[(place + 0.15 * torch.randn(n, generator=torch.Generator().manual_seed(0))).argsort()]


DATA: dict[str, Callable[[int], Tensor]] = {"clusters": clusters, "photographs": photographs}


def truth_of(x: Tensor) -> tuple[Tensor, Tensor]:
    """The true results (Q, k) of queries (Q, d), which are rows with noise."""
    generator = torch.Generator().manual_seed(5)
    queries = x[torch.randperm(x.shape[0], generator=generator)[:QUERIES]]
    queries = queries + 0.05 * x.std() * torch.randn(queries.shape, generator=generator)
    flat = IndexFlat(x.shape[1])
    flat.add(x)
    return flat.search(queries, K)[1], queries
