"""Indexes, graphs of them and a model, for the tests of graphs, of their compilation and of exported files."""

from __future__ import annotations

from functools import cache

import torch
from torch import nn

from torch_ivf_module import IndexIVFFlat, export

D, K = 12, 5


@cache
def index_of(metric: str = "l2", dtype: torch.dtype = torch.float32) -> IndexIVFFlat:
    """An index with lists of different lengths, small and large ids, and duplicate ids."""
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(900, D, generator=generator)
    index = IndexIVFFlat(D, nlist=9, nprobe=3, metric=metric, k=K, dtype=dtype)
    index.train(x[:400])
    index.add(x)
    index.add(x[:300] * 0.01 + x[0])
    index.add_with_ids(x[:50] + 0.5, torch.arange(50) + (1 << 40))
    return index


def queries(n: int = 30, seed: int = 4) -> torch.Tensor:
    return torch.randn(n, D, generator=torch.Generator().manual_seed(seed))


def same(found, expected) -> None:
    """Assert that two answers, D and I, agree as `export.compare` says."""
    agreement = export.compare(tuple(found), tuple(expected))
    assert agreement.good, agreement


GRAPHS = {
    "rows": dict(),
    "tiles": dict(layout="tiles"),
    "half": dict(storage=torch.float16),
    "half tiles": dict(storage=torch.float16, layout="tiles"),
    "all lists": dict(nprobe=9),
    "capped": dict(max_codes=300),
    "k beyond": dict(k=2000, nprobe=9),
}


def alike(found, expected) -> None:
    """`same` for a model whose head changes the distances, so that they do not tell which ids are tied."""
    torch.testing.assert_close(found[0], expected[0], rtol=1e-4, atol=1e-4)
    assert torch.equal(found[1], expected[1])


class Model(nn.Module):
    """An encoder, a graph, a head."""

    def __init__(self, graph: nn.Module) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.encoder, self.index, self.head = nn.Linear(6, D), graph, nn.Linear(K, 2)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        D_, I = self.index(self.encoder(x))
        return self.head(D_), I

