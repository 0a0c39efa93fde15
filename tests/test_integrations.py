"""Adaptors for other libraries, as far as they need none of these; `make test-integrations` tests them beside these."""

from __future__ import annotations

import ast
import re
import sys
from importlib import import_module
from pathlib import Path

import pytest
import torch

from torch_ivf_module import IndexIVFFlat, integrations
from torch_ivf_module.integrations import torch_geometric
from torch_ivf_module.integrations.pytorch_metric_learning import IndexKNN
from torch_ivf_module.integrations.sentence_transformers import semantic_search

ROOT = Path(__file__).parent.parent
FOLDER = Path(integrations.__file__).parent
NAMES = sorted(file.stem for file in FOLDER.glob("*.py") if file.stem != "__init__")
NEED = {"anomalib": "anomalib", "langchain": "langchain_core", "lightning": "lightning"}
X = torch.randn(200, 8, generator=torch.Generator().manual_seed(0))


# --- importing them -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_each_has_an_extra_a_section_and_a_test(name):
    extra = name.replace("_", "-")
    assert re.search(rf'^{extra} = \["', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    tree = ast.parse((FOLDER / f"{name}.py").read_text())
    assert f"`{extra}`" in (ast.get_docstring(tree) or "")
    page = (ROOT / "docs" / "integrations.md").read_text(encoding="utf-8")
    assert f"| `{extra}` |" in page
    assert f"from torch_ivf_module.integrations.{name} import" in page
    assert f"use_{name}.py" in {file.name for file in (ROOT / "integrations").iterdir()}
    runner = (ROOT / "integrations" / "run.py").read_text()
    assert f'"{name}": [' in runner
    assert re.search(rf'^    "{name}": "{extra}[,"]', runner, re.MULTILINE)  # its environment is made from the extra


@pytest.mark.parametrize("name", NAMES)
def test_a_missing_library_is_named_with_its_extra(name, monkeypatch):
    module = f"{integrations.__name__}.{name}"
    monkeypatch.delitem(sys.modules, module, raising=False)
    for library in (*NEED.values(), "pytorch_metric_learning", "sentence_transformers", "torch_geometric"):
        monkeypatch.setitem(sys.modules, library, None)
    if name not in NEED:
        assert import_module(module)  # needs nothing of the library
        return
    expected = re.escape(f"{NEED[name]} is needed here and is not installed; it comes with: pip install ")
    with pytest.raises(ImportError, match=expected + re.escape(f"'torch-ivf-module[{name}]'")):
        import_module(module)


# --- what they need nothing else for --------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["Flat", "IVF4,Flat", "IVF4,SQ8"])
@pytest.mark.parametrize("n", [0, 1, 60])
def test_links_are_not_found(kind, n):
    knn, generator = torch_geometric.KNNIndex(kind, emb=X), torch.Generator().manual_seed(1)
    rows = torch.randint(20, (n,), generator=generator)
    links = torch.stack([rows, knn.search(X[rows], 3).index[:, n % 3] if n else rows])
    links = torch.cat([links, torch.tensor([[3], [2**40]])], 1)  # and one that is not there
    found = knn.search(X[:20], 5, exclude_links=links)
    every = knn.search(X[:20], 200)
    dropped = {tuple(pair) for pair in links.T.tolist()}
    for row in range(20):
        ids = every.index[row].tolist()
        kept = [at for at, id in enumerate(ids) if id >= 0 and (row, id) not in dropped][:5]
        assert torch.equal(found.index[row], every.index[row, kept])
        torch.testing.assert_close(found.score[row], every.score[row, kept])


def test_too_few_neighbours_are_padded():
    found = torch_geometric.KNNIndex(emb=X[:3]).search(X[:2], 3, exclude_links=torch.tensor([[0, 0, 1], [0, 2, 1]]))
    assert found.index.tolist()[0][1:] == [-1, -1]
    assert found.score.tolist()[0][1:] == [-torch.inf, -torch.inf]
    assert sorted(found.index.tolist()[1]) == [-1, 0, 2]


def test_the_query_in_the_reference_is_not_its_own_neighbour():
    D, I = IndexKNN()(X[:30], 29, X, ref_includes_query=True)
    distances = torch.cdist(X[:30].double(), X.double()).square().fill_diagonal_(torch.inf)
    assert torch.equal(I, distances.topk(29, largest=False).indices)
    assert (I != torch.arange(30)[:, None]).all()
    assert D.isfinite().all()


def test_knn_is_a_module():
    knn = IndexKNN(reset_before=False, reset_after=False, index_init_fn=lambda d: IndexIVFFlat(d, nlist=4))
    assert knn.train(X) is knn
    assert knn.eval().training is False
    again = IndexKNN(reset_before=False, reset_after=False)
    again.index = IndexIVFFlat(8, nlist=4)
    again.load_state_dict(knn.state_dict())
    assert torch.equal(again(X, 3)[1], knn(X, 3)[1])
    query = X[:5].clone().requires_grad_()
    knn(query, 3, ref_includes_query=True)[0].sum().backward()
    assert query.grad.abs().sum() > 0


def test_knn_without_an_index():
    knn = IndexKNN(reset_before=False)
    for call in (lambda: knn(X, 1), lambda: knn.add(X), lambda: knn.save("never")):
        with pytest.raises(ValueError, match=r"there is no index.*call train\(embeddings\) first"):
            call()


def test_knn_index_is_a_module():
    index = torch_geometric.KNNIndex("IVF2,SQ8")
    with pytest.raises(RuntimeError, match=r"KNNIndex has no points: call add\(emb\) first"):
        index.search(X, 1)
    with pytest.raises(ValueError, match=r"must have no L2norm, got 'L2norm,Flat'"):
        torch_geometric.KNNIndex("L2norm,Flat", emb=X)
    with pytest.raises(ValueError, match=r"emb must have two dimensions, got shape \(8,\)"):
        index.add(X[0])
    index.add(X[:100])
    index.add(X[100:])
    assert (index.numel, index.get_emb().shape) == (200, (200, 8))
    again = torch_geometric.KNNIndex("IVF2,SQ8", emb=X[:80])
    again.load_state_dict(index.state_dict())
    assert torch.equal(again(X[:9], k=3).index, index.search(X[:9], k=3).index)
    query = X[:5].clone().requires_grad_()
    index.search(query, k=3, exclude_links=torch.tensor([[0], [0]])).score.sum().backward()
    assert query.grad.abs().sum() > 0


def test_semantic_search_of_one_query_and_few_texts():
    hits = semantic_search(X[0].tolist(), X[:3], top_k=10)
    assert [sorted(hit) for hit in hits[0]] == [["corpus_id", "score"]] * 3
    assert hits[0][0] == {"corpus_id": 0, "score": pytest.approx(1)}
