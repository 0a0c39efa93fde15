"""pytorch-metric-learning: FaissKNN, FaissKMeans, AccuracyCalculator, InferenceModel, PCA."""

from __future__ import annotations

import faiss
import numpy as np
import pytest
import torch
from pytorch_metric_learning.distances import CosineSimilarity, LpDistance
from pytorch_metric_learning.utils.accuracy_calculator import AccuracyCalculator
from pytorch_metric_learning.utils.inference import CustomKNN, FaissKMeans, FaissKNN, InferenceModel, run_pca

from torch_ivf_module import IndexIVFFlat
from torch_ivf_module.integrations.pytorch_metric_learning import IndexKNN

GENERATOR = torch.Generator().manual_seed(0)
LABELS = torch.arange(400) % 10
CENTRES = torch.randn(10, 32, generator=GENERATOR)
X = CENTRES[LABELS] + 0.5 * torch.randn(400, 32, generator=GENERATOR)


def test_faiss_is_not_here():
    assert faiss.__name__ == "torch_ivf_module.faiss_compat"


@pytest.mark.parametrize("makes", [faiss.IndexFlatL2, faiss.IndexFlatIP, lambda d: faiss.index_factory(d, "Flat")])
@pytest.mark.parametrize("itself", [True, False])
def test_neighbours(makes, itself):
    distances, ids = FaissKNN(index_init_fn=makes)(X, 5, X, ref_includes_query=itself)
    expected = X @ X.T if makes is faiss.IndexFlatIP else -torch.cdist(X, X).square()
    if itself:
        expected.fill_diagonal_(-torch.inf)
    best, at = expected.topk(5)
    assert (ids == at).float().mean() > 0.999
    torch.testing.assert_close(distances, best if makes is faiss.IndexFlatIP else -best, rtol=1e-3, atol=1e-3)


def test_train_add_save_load(tmp_path):
    knn = FaissKNN(reset_before=False, reset_after=False)
    knn.train(X[:200])
    knn.add(X[200:])
    knn.save(str(tmp_path / "knn.index"))
    other = FaissKNN(reset_before=False, reset_after=False)
    other.load(str(tmp_path / "knn.index"))
    for mine, theirs in zip(knn(X[:9], 3), other(X[:9], 3), strict=True):
        torch.testing.assert_close(mine, theirs)


def test_accuracies():
    names = ("precision_at_1", "r_precision", "mean_average_precision_at_r", "NMI", "AMI")
    kinds = dict(include=names, k="max_bin_count")
    mine = AccuracyCalculator(**kinds)
    exact = AccuracyCalculator(knn_func=CustomKNN(LpDistance(normalize_embeddings=False, power=2)), **kinds)
    found, expected = (calculator.get_accuracy(X, LABELS) for calculator in (mine, exact))
    for name in names[:3]:
        assert found[name] == pytest.approx(expected[name], abs=1e-4)
    assert found["NMI"] > 0.9
    found = mine.get_accuracy(X[:100], LABELS[:100], X[100:], LABELS[100:])
    assert found["precision_at_1"] == exact.get_accuracy(X[:100], LABELS[:100], X[100:], LABELS[100:])["precision_at_1"]


def test_clusters_and_pca():
    assigned = FaissKMeans(niter=20, nredo=5, seed=1)(X, 10)
    assert assigned.shape == (400,)
    pairs = {(int(a), int(b)) for a, b in zip(assigned, LABELS, strict=True)}
    assert len(pairs) <= 14
    reduced = run_pca(X, 4)
    centred = (X - X.mean(0)).numpy()
    expected = np.linalg.svd(centred, full_matrices=False)[1][:4]
    np.testing.assert_allclose(np.linalg.norm(reduced.numpy(), axis=0), expected, rtol=1e-3)


def test_a_model_for_inference():
    model = InferenceModel(torch.nn.Identity(), knn_func=FaissKNN(reset_before=False, reset_after=False))
    model.train_knn(X)
    ids = model.get_nearest_neighbors(X[:7], k=1)[1]
    assert ids.flatten().tolist() == list(range(7))
    assert CosineSimilarity() is not None


# --- the adaptor IndexKNN -------------------------------------------------------------------------------------------


def lists(d):
    return IndexIVFFlat(d, nlist=8, nprobe=8)


@pytest.mark.parametrize("makes", [None, lists])
@pytest.mark.parametrize("itself", [True, False])
@pytest.mark.parametrize("queries", [X, X[:50]])
def test_the_adaptor_finds_what_faiss_knn_finds(makes, itself, queries):
    D, I = IndexKNN(index_init_fn=makes)(queries, 5, X, ref_includes_query=itself)
    expected, ids = FaissKNN()(queries, 5, X, ref_includes_query=itself)
    assert torch.equal(I, ids)
    torch.testing.assert_close(D, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("makes", [None, lists])
def test_the_adaptor_in_the_accuracy_calculator(makes):
    kinds = dict(include=("precision_at_1", "r_precision", "mean_average_precision_at_r"), k="max_bin_count")
    found = AccuracyCalculator(knn_func=IndexKNN(index_init_fn=makes), **kinds)
    expected = AccuracyCalculator(knn_func=FaissKNN(), **kinds)
    assert found.get_accuracy(X, LABELS) == pytest.approx(expected.get_accuracy(X, LABELS))
    parts = X[:100], LABELS[:100], X[100:], LABELS[100:]
    assert found.get_accuracy(*parts) == pytest.approx(expected.get_accuracy(*parts))


def test_the_adaptor_in_a_model_for_inference(tmp_path):
    knn, other = (IndexKNN(reset_before=False, reset_after=False) for _ in range(2))
    model = InferenceModel(torch.nn.Identity(), knn_func=knn)
    model.train_knn(X[:200])
    model.add_to_knn(X[200:])
    assert model.get_nearest_neighbors(X[195:205], k=1)[1].flatten().tolist() == list(range(195, 205))
    model.save_knn_func(tmp_path / "knn.pt")
    again = InferenceModel(torch.nn.Identity(), knn_func=other)
    again.load_knn_func(tmp_path / "knn.pt")
    for mine, theirs in zip(model.get_nearest_neighbors(X[:9], 3), again.get_nearest_neighbors(X[:9], 3), strict=True):
        assert torch.equal(mine, theirs)


def test_the_documented_program(documented):
    names = documented("pytorch-metric-learning")
    assert names["accuracies"]["precision_at_1"] > 0.9
    assert not (names["ids"] == torch.arange(5)[:, None]).any()
