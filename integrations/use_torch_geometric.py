"""torch_geometric: the KNNIndex family. The two of them that need IndexIVFPQ say so."""

from __future__ import annotations

import faiss
import pytest
import torch
import torch_geometric.nn
from torch_geometric.nn import ApproxL2KNNIndex, ApproxMIPSKNNIndex, KNNIndex, L2KNNIndex, MIPSKNNIndex

from torch_ivf_module.integrations import torch_geometric as adaptor

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


# --- the adaptor: modules of the same names -------------------------------------------------------------------------

LINKS = torch.stack([torch.arange(20).repeat_interleave(7), torch.randint(300, (140,), generator=GENERATOR)])


@pytest.mark.parametrize("name", ["L2KNNIndex", "MIPSKNNIndex"])
@pytest.mark.parametrize("links", [None, LINKS, LINKS[:, :30], LINKS[:, :0]], ids=["none", "all", "some", "empty"])
def test_the_adaptor_finds_what_pyg_finds(name, links):
    ours, theirs = getattr(adaptor, name)(X), getattr(torch_geometric.nn, name)(X)
    found, expected = (index.search(QUERIES, k=5, exclude_links=links) for index in (ours, theirs))
    assert torch.equal(found.index, expected.index)
    torch.testing.assert_close(found.score, expected.score, rtol=1e-4, atol=1e-4)
    assert torch.equal(ours.get_emb(), theirs.get_emb())


@pytest.mark.parametrize("name", ["L2KNNIndex", "MIPSKNNIndex"])
def test_the_adaptor_with_few_points(name):
    links = torch.tensor([[0, 0, 3], [0, 2, 1]])
    ours, theirs = getattr(adaptor, name)(X[:4]), getattr(torch_geometric.nn, name)(X[:4])
    for k in (1, 3, 4):
        found, expected = (index.search(QUERIES, k=k, exclude_links=links) for index in (ours, theirs))
        assert torch.equal(found.index, expected.index)
        torch.testing.assert_close(found.score, expected.score, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("description", ["Flat", "IVF4,Flat"])
def test_the_adaptor_takes_factory_strings(description):
    ours, theirs = adaptor.KNNIndex(description, emb=X), KNNIndex(description, emb=X)
    for index in (ours, theirs):
        if "IVF" in description:
            index.index.nprobe = 4
    assert torch.equal(ours.search(QUERIES, 5).index, theirs.search(QUERIES, 5).index)


def test_the_documented_program(documented):
    names = documented("PyG")
    found, (rows, items) = names["found"].index, names["bought"]
    assert found.shape == (10, 20)
    assert not (found[rows] == items[:, None]).any()
