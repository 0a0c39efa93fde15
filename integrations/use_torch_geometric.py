"""torch_geometric: the KNNIndex family. The two of them that need IndexIVFPQ say so."""

from __future__ import annotations

import faiss
import pytest
import torch
from torch_geometric.nn import ApproxL2KNNIndex, ApproxMIPSKNNIndex, KNNIndex, L2KNNIndex, MIPSKNNIndex

GENERATOR = torch.Generator().manual_seed(0)
X, QUERIES = torch.randn(300, 16, generator=GENERATOR), torch.randn(20, 16, generator=GENERATOR)
SCORES = {
    L2KNNIndex: -torch.cdist(QUERIES, X).square(),
    MIPSKNNIndex: QUERIES @ X.T,
}


def test_faiss_is_not_here():
    assert faiss.__name__ == "torch_ivf_module.faiss_compat"


@pytest.mark.parametrize("kind", SCORES)
def test_neighbours(kind):
    index = kind(emb=X[:100])
    index.add(X[100:])
    assert index.numel == 300
    found = index.search(QUERIES, k=5)
    best, at = SCORES[kind].topk(5)
    assert torch.equal(found.index, at)
    torch.testing.assert_close(found.score, best if kind is MIPSKNNIndex else -best, rtol=1e-4, atol=1e-4)
    assert torch.equal(index.get_emb(), X)


@pytest.mark.parametrize("kind", SCORES)
def test_links_are_left_out(kind):
    best = SCORES[kind].argmax(1)
    links = torch.stack([torch.arange(20), best])
    found = kind(emb=X).search(QUERIES, k=5, exclude_links=links)
    assert not (found.index == best[:, None]).any()
    assert torch.equal(found.index, SCORES[kind].topk(6).indices[:, 1:])


@pytest.mark.parametrize("description", ["Flat", "IVF4,Flat", "PCA16,Flat"])
def test_factory_strings(description):
    index = KNNIndex(description, emb=X)
    if "IVF" in description:
        index.index.nprobe = 4
    assert torch.equal(index.search(X[:9], k=1).index[:, 0], torch.arange(9))


@pytest.mark.parametrize("kind", [ApproxL2KNNIndex, ApproxMIPSKNNIndex])
def test_product_quantizers_are_named(kind):
    with pytest.raises(AttributeError, match="no 'IndexIVFPQ'"):
        kind(num_cells=4, num_cells_to_visit=2, bits_per_vector=8, emb=X)
