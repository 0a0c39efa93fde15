"""`IndexPreTransform` has what its index has, for vectors before the transform."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from tests.datasets import normal
from torch_ivf_module import IndexFlatL2, IndexIVFFlat, IndexPreTransform


def projected(seed: int = 0) -> IndexPreTransform:
    """A filled index of 50 vectors of dimension 6, projected to 3."""
    linear = nn.Linear(6, 3, bias=False).requires_grad_(False)
    with torch.no_grad():
        linear.weight.copy_(normal(3, 6, seed=seed))
    index = IndexPreTransform(6, linear, IndexFlatL2(3))
    index.add(normal(50, 6, seed=1))
    return index


def test_vectors_are_replaced_and_read_as_the_index_has_them():
    index, x = projected(), normal(2, 6, seed=2)
    index.update(torch.tensor([7, 9]), x)
    inside = index.apply_transform(x)
    assert torch.equal(index.reconstruct(9), inside[1])
    assert torch.equal(index.reconstruct_batch(torch.tensor([9, 7])), inside.flip(0))
    assert torch.equal(index.reconstruct_n(7, 3)[[0, 2]], inside)
    distances, ids, vectors = index.search_and_reconstruct(x, 1)
    assert ids.tolist() == [[7], [9]]
    assert torch.equal(vectors[:, 0], inside)
    assert (distances == 0).all()
    assert (index.device, index.dtype) == (torch.device("cpu"), torch.float32)
    assert index.memory_bytes() > index.index.memory_bytes()


def test_merging_and_subsets():
    index, other = projected(), projected()
    index.merge_from(other, add_id=50)
    assert (index.ntotal, other.ntotal) == (100, 0)
    some = index.copy_subset(torch.tensor([3, 60]))
    assert some.search(normal(50, 6, seed=1)[[3, 10]], 1)[1].tolist() == [[3], [60]]


def test_another_transform_is_refused_and_nothing_changes():
    index, other = projected(), projected(seed=3)
    with pytest.raises(ValueError, match="same transform"):
        index.merge_from(other)
    with pytest.raises(TypeError, match="IndexPreTransform, got IndexFlatL2"):
        index.merge_from(other.index)
    assert (index.ntotal, other.ntotal) == (50, 50)


def lists() -> IndexPreTransform:
    """A filled index of 200 vectors of dimension 6, projected to 3, in 4 lists."""
    index = IndexPreTransform(6, projected().transform, IndexIVFFlat(3, nlist=4, nprobe=1))
    index.train(normal(200, 6))
    index.add(normal(200, 6))
    return index


# What belongs to the index behind the transform alone: its state and what this library itself uses of it.
ITS_OWN = {"config", "checked_params", "reset_parameters", "search_options", "store", "without_own_buffers"}
OF_TORCH_IVF = {
    "approximate_mode", "auto_search_avg_group_threshold", "csr_small_batch_avg_group_threshold", "dml", "rocm",
}  # fmt: skip


def test_it_has_every_method_and_setting_of_an_inverted_file():
    public = {name for name in dir(IndexIVFFlat) if not name.startswith("_")} | {"last_search_stats"}
    missing = public - set(dir(IndexPreTransform)) - set(dir(nn.Module))
    assert missing == (ITS_OWN | OF_TORCH_IVF) & public


def test_settings_are_those_of_the_index():
    index = lists()
    index.nprobe, index.k, index.codes, index.max_codes = 3, 5, None, 70
    inner = index.index
    assert (inner.nprobe, inner.k, inner.codes, inner.max_codes) == (3, 5, None, 70)
    assert (index.nprobe, index.nlist, index(normal(2, 6))[1].shape) == (3, 4, (2, 5))
    assert index.list_stats() == inner.list_stats()
    with pytest.raises(ValueError, match="nprobe must be"):
        index.nprobe = 0


def test_lists_are_ordered_and_trained_anew():
    index = lists()
    index.rebuild_lists()
    assert index.list_ordering == "residual_norm_asc"
    x, twin = normal(160, 6, seed=4), lists()
    assert index.retrain(x, niter=3) == twin.index.retrain(twin.apply_transform(x), niter=3)
    assert torch.equal(index.index.centroids, twin.index.centroids)
    assert index.retrain().total == 200


def test_a_flat_index_behind_a_transform_has_no_settings_of_lists():
    index = projected()
    assert not hasattr(index, "nprobe")
    with pytest.raises(AttributeError, match="nprobe"):
        index.nprobe = 4
    with pytest.raises(AttributeError, match="retrain"):
        index.retrain()
