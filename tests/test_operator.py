"""torch.ops.torch_ivf_module.search, which compiled models call: its results, derivative, vmap and fake results."""

from __future__ import annotations

import gc

import pytest
import torch
from torch import Tensor

from tests.datasets import problem
from tests.oracle import agree
from tests.problems import each_metric, shared
from torch_ivf_module import IndexFlatL2, SearchParams
from torch_ivf_module.index.operator import new_handle
from torch_ivf_module.params import DEFAULTS

CASE = problem("wide")
FIELDS = SearchParams.__dataclass_fields__


def call(handle: int, x: Tensor, k: int = 5, with_vectors: bool = True) -> tuple[Tensor, Tensor, Tensor]:
    settings = [getattr(DEFAULTS, name) for name in FIELDS]
    return torch.ops.torch_ivf_module.search(x, handle, k, with_vectors, *settings)


@each_metric
def test_results_and_derivative_are_those_of_a_search(metric):
    index, _, queries = shared(CASE, metric)
    handle = new_handle(index)
    x, y = (queries.clone().requires_grad_() for _ in range(2))
    D, I, R = call(handle, x)
    expected = index.search_and_reconstruct(y, 5)
    agree((D.detach(), I), (expected[0].detach(), expected[1]), rtol=1e-5, atol=1e-5)
    assert torch.equal(R, index.reconstruct_batch(I.flatten()).view_as(R))
    weights = torch.linspace(-1, 1, D.numel()).view_as(D)
    (D * weights).sum().backward()
    (expected[0] * weights).sum().backward()
    torch.testing.assert_close(x.grad, y.grad, rtol=1e-4, atol=1e-4)


def test_padding_has_no_derivative():
    index = IndexFlatL2(2)
    index.add(torch.eye(2))
    x = torch.tensor([[1.0, 1.0], [torch.nan, 0.0]], requires_grad=True)
    D, I, _ = call(new_handle(index), x)
    assert (I[:, 2:] == -1).all()
    torch.where(D.isinf(), 0, D).sum().backward()
    torch.testing.assert_close(x.grad, torch.tensor([[2.0, 2.0], [0.0, 0.0]]))


def test_without_vectors_a_derivative_is_refused():
    index, _, queries = shared(CASE)
    x = queries.clone().requires_grad_()
    D = call(new_handle(index), x, with_vectors=False)[0]
    with pytest.raises(RuntimeError, match="with_vectors=True"):
        D.sum().backward()


def test_vmap_is_one_search_of_all_queries():
    index, _, queries = shared(CASE)
    handle, batch = new_handle(index), queries[:6].view(2, 3, -1)
    D, I, R = torch.func.vmap(lambda x: call(handle, x))(batch)
    expected = call(handle, queries[:6])
    for found, wanted in zip((D, I, R), expected, strict=True):
        assert torch.equal(found.flatten(0, 1), wanted)


@pytest.mark.parametrize("with_vectors", [True, False])
def test_the_operator_is_registered_as_torch_expects(with_vectors):
    index, _, queries = shared(CASE)
    arguments = (queries[:3].clone(), new_handle(index), 5, with_vectors, *(getattr(DEFAULTS, name) for name in FIELDS))
    checks = ["test_schema", "test_autograd_registration", "test_faketensor"]
    torch.library.opcheck(torch.ops.torch_ivf_module.search.default, arguments, test_utils=checks)


def test_an_index_that_is_gone_is_an_error():
    index = IndexFlatL2(2)
    handle = new_handle(index)
    del index
    gc.collect()
    with pytest.raises(RuntimeError, match="no longer there"):
        call(handle, torch.eye(2))
