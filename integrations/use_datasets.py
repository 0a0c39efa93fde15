"""Hugging Face datasets: add_faiss_index, get_nearest_examples, save and load."""

from __future__ import annotations

import faiss
import numpy as np
import pytest
from datasets import Dataset
from datasets.search import FaissIndex

RS = np.random.RandomState(0)
X = RS.randn(500, 16).astype("float32")
QUERY = X[17] + 0.01 * RS.randn(16).astype("float32")
NEAREST = np.argsort(((X - QUERY) ** 2).sum(1))[:5].tolist()


def data():
    return Dataset.from_dict({"vector": X, "number": range(len(X))}).with_format("numpy")


def test_faiss_is_not_here():
    assert faiss.__name__ == "torch_ivf_module.faiss_compat"


@pytest.mark.parametrize("factory", [None, "Flat", "IVF8,Flat", "PCA16,Flat"])
def test_nearest_examples(factory):
    dataset = data()
    dataset.add_faiss_index("vector", string_factory=factory, train_size=400 if factory else None, faiss_verbose=True)
    if factory and "IVF" in factory:
        dataset.get_index("vector").faiss_index.nprobe = 8
    scores, examples = dataset.get_nearest_examples("vector", QUERY, k=5)
    assert examples["number"].tolist() == NEAREST
    np.testing.assert_allclose(scores, np.sort(((X - QUERY) ** 2).sum(1))[:5], rtol=1e-3, atol=1e-3)
    scores, examples = dataset.get_nearest_examples_batch("vector", np.stack([QUERY, X[3]]), k=2)
    assert [part["number"][0] for part in examples] == [NEAREST[0], 3]


def test_inner_product_and_a_custom_index():
    dataset = data()
    dataset.add_faiss_index("vector", index_name="ip", metric_type=faiss.METRIC_INNER_PRODUCT)
    assert dataset.search("ip", QUERY, k=1).indices.tolist() == [int((X @ QUERY).argmax())]
    dataset.add_faiss_index("vector", index_name="own", custom_index=faiss.IndexFlatL2(16))
    assert dataset.search("own", QUERY, k=5).indices.tolist() == NEAREST
    dataset.add_faiss_index_from_external_arrays(X, index_name="arrays")
    assert dataset.search("arrays", QUERY, k=5).indices.tolist() == NEAREST


def test_save_and_load(tmp_path):
    dataset, path = data(), str(tmp_path / "index.faiss")
    dataset.add_faiss_index("vector")
    dataset.save_faiss_index("vector", path)
    again = data()
    again.load_faiss_index("vector", path)
    assert again.search("vector", QUERY, k=5).indices.tolist() == NEAREST
    index = FaissIndex.load(path)
    assert index.search(QUERY, 5).indices.tolist() == NEAREST
    assert index.search_batch(X[:3], 1).total_indices.ravel().tolist() == [0, 1, 2]


def test_more_neighbours_than_rows():
    dataset = data().select(range(3)).with_format("numpy")
    dataset.add_faiss_index("vector")
    assert len(dataset.get_nearest_examples("vector", QUERY, k=10).scores) == 3
