"""`IndexPreTransform` has what its index has, for vectors before the transform."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from tests.datasets import normal
from torch_ivf_module import IndexFlatL2, IndexPreTransform


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
