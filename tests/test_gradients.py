"""Gradients of distances with respect to queries."""

from __future__ import annotations

import threading

import pytest
import torch
from torch import nn

from tests.datasets import PLAIN, normal, problem
from tests.oracle import agree, comparable, stored_rows
from tests.problems import each_dtype, each_metric, each_mode, ivf, shared
from torch_ivf_module.functional.metric import exact_scores


def _gradient(x, vectors, metric):
    """The gradient in x (Q, d) of the sum of D over vectors (Q, K, d), in float64."""
    x, vectors = x.double(), vectors.double()
    if metric == "l2":
        return (2 * (x[:, None] - vectors)).sum(1)
    if metric == "ip":
        return vectors.sum(1)
    norm = x.norm(dim=1, keepdim=True)
    along = x / norm
    return ((vectors - (vectors @ along[:, :, None]) * along[:, None]) / norm[:, None]).sum(1)


@each_mode
@each_dtype
@each_metric
@pytest.mark.parametrize("pending", [False, True])
def test_gradient_of_distances(pending, mode, dtype, metric):
    index, base, queries = shared(PLAIN, metric, dtype, search_mode=mode)
    if pending:
        index.add(base[:40] * 1.1)
    plain = index.search(queries, 6)
    x = queries.clone().requires_grad_()
    D, I = index.search(x, 6)
    assert D.requires_grad
    assert not I.requires_grad
    agree((D.detach(), I), plain, rtol=1e-5, atol=1e-5)
    D.sum().backward()
    ids, vectors, _ = stored_rows(index)
    rows = torch.stack([(ids == i).nonzero()[0, 0] for i in I.flatten()]).view(I.shape)
    expected = _gradient(x.detach(), vectors[rows], metric)
    torch.testing.assert_close(x.grad.double(), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", [torch.float64, torch.float16])
def test_gradient_has_the_dtype_of_the_queries(kind):
    index, _, queries = shared()
    x = queries.to(kind).requires_grad_()
    index.search(x, 3)[0].sum().backward()
    assert x.grad.dtype == kind
    assert x.grad.isfinite().all()
    assert x.grad.abs().sum() > 0


@pytest.mark.parametrize(
    "name",
    [
        "plain",
        "k above everything",
        "nothing added",
        "bad queries",
        "zero vectors",
        "duplicates",
        "no queries",
        "empty lists",
    ],
)
@each_mode
@each_metric
def test_gradients_of_padding_and_of_equal_vectors_are_finite(name, mode, metric):
    case = problem(name)
    index, _, queries = shared(case, metric, search_mode=mode)
    x = queries.clone().requires_grad_()
    D, _ = index.search(x, case.k)
    D.masked_fill(D.isinf(), 0).sum().backward()
    good = queries.isfinite().all(1)
    assert x.grad[good].isfinite().all()


def test_no_autograd_graph_without_grad_mode():
    index, _, queries = shared()
    assert not index.search(queries, 3)[0].requires_grad
    x = queries.clone().requires_grad_()
    with torch.no_grad():
        assert not index.search(x, 3)[0].requires_grad
    with torch.inference_mode():
        agree(index.search(queries, 3), index.search(queries, 3), rtol=1e-6)
    agree(index.search(queries, 3), index.search(queries.clone(), 3), rtol=1e-6)


def test_built_in_inference_mode_and_used_outside():
    """Buffers created in inference mode serve searches with gradients, and rows can be added."""
    with torch.inference_mode():
        index, base, queries = ivf()
        index.search(queries, 3)
    x = queries.clone().requires_grad_()
    index.search(x, 3)[0].sum().backward()
    assert x.grad.isfinite().all()
    index.add(base.clone())
    assert index.ntotal == 2 * PLAIN.nb


@each_metric
def test_gradient_reaches_an_encoder(metric):
    torch.manual_seed(0)
    encoder = nn.Linear(8, 16)
    index, _, _ = shared(PLAIN, metric)
    model = nn.Sequential(encoder, index)
    x = normal(12, 8)
    D, I = model(x)
    D.mean().backward()
    ids, vectors, _ = stored_rows(index)
    rows = torch.stack([(ids == i).nonzero()[0, 0] for i in I.flatten()]).view(I.shape)
    outer = _gradient(encoder(x).detach(), vectors[rows], metric) / D.numel()
    torch.testing.assert_close(encoder.weight.grad.double(), outer.T @ x.double(), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(encoder.bias.grad.double(), outer.sum(0), rtol=1e-4, atol=1e-5)


@each_metric
def test_gradcheck_of_exact_scores(metric):
    x = comparable(normal(3, 4), metric).requires_grad_()
    vectors = comparable(normal(15, 4, seed=1), metric).view(3, 5, 4).requires_grad_()
    assert torch.autograd.gradcheck(lambda a, b: exact_scores(a, b, metric), (x, vectors))
    scores = exact_scores(x, vectors, metric)
    difference = x[:, None] - vectors
    expected = -difference.square().sum(2) if metric == "l2" else (x[:, None] * vectors).sum(2)
    torch.testing.assert_close(scores, expected)


def test_gradients_from_several_threads():
    index, _, queries = shared()
    grads = {}

    def work(name):
        x = queries.clone().requires_grad_()
        index.search(x, 3)[0].sum().backward()
        grads[name] = x.grad

    threads = [threading.Thread(target=work, args=(name,)) for name in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(grads) == 3
    torch.testing.assert_close(grads[1], grads[0])
    torch.testing.assert_close(grads[2], grads[0])
