"""Derivatives and torch.func transforms of a search, against a brute-force search in plain operations."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.autograd import forward_ad
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, vmap
from torch.utils._pytree import tree_leaves

from tests.datasets import normal
from tests.problems import each_metric
from torch_ivf_module import IndexFlat, IndexFlatL2, IndexIVFFlat, SearchParams

D, K = 8, 3
# Forward mode loads decompositions that torch itself writes in TorchScript.
pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.script")
X = normal(400, D)
Q, V = normal(4, D, seed=5), normal(4, D, seed=6)


def index_and_search(kind: str, metric: str):
    """An index with packed and pending rows, and its distances as a function of queries."""
    if kind == "ivf":
        index = IndexIVFFlat(D, nlist=4, nprobe=4, metric=metric)
        index.train(X)
    else:
        index = IndexFlat(D, metric=metric)
    index.add(X[:390])
    index.add(X[390:])
    if kind in ("rows", "tiles"):
        graph = index.graph(k=K, layout=kind)
        return index, lambda x: graph(x)[0]
    return index, lambda x: index.search(x, K)[0]


def plain(metric: str):
    def distances(x):
        if metric == "l2":
            return (x[..., None, :] - X).square().sum(-1).topk(K, largest=False)[0]
        rows = X
        if metric == "cosine":
            x, rows = nn.functional.normalize(x, dim=-1), nn.functional.normalize(X, dim=-1)
        return (x @ rows.t()).topk(K)[0]

    return distances


def of_one(f):
    """A scalar function of one query (d,), with a second derivative."""
    return lambda x: f(x[None]).square().sum()


def dual(f):
    with forward_ad.dual_level():
        return forward_ad.unpack_dual(f(forward_ad.make_dual(Q, V))).tangent


def twice(f):
    x = Q.clone().requires_grad_()
    first = torch.autograd.grad(f(x).square().sum(), x, create_graph=True)[0]
    return torch.autograd.grad((first * V).sum(), x)[0]


TRANSFORMS = {
    "grad": lambda f: grad(lambda x: f(x).square().sum())(Q),
    "jacrev": lambda f: jacrev(f)(Q),
    "jvp": lambda f: jvp(f, (Q,), (V,))[1],
    "jacfwd": lambda f: jacfwd(f)(Q),
    "vmap": lambda f: vmap(f, in_dims=1)(Q.view(2, 2, D)),
    "vmap of vmap": lambda f: vmap(vmap(f))(Q.view(2, 2, 1, D)),
    "vmap of grad": lambda f: vmap(grad(of_one(f)))(Q),
    "vmap of jvp": lambda f: vmap(lambda x, v: jvp(f, (x[None],), (v[None],))[1])(Q, V),
    "hessian": lambda f: hessian(of_one(f))(Q[0]),
    "forward twice": lambda f: jacfwd(jacfwd(of_one(f)))(Q[0]),
    "reverse twice": lambda f: jacrev(jacrev(of_one(f)))(Q[0]),
    "dual numbers": dual,
    "double backward": twice,
}


@pytest.mark.parametrize("kernel", [True, False])
@each_metric
@pytest.mark.parametrize("kind", ["flat", "ivf", "rows", "tiles"])
def test_transforms(kind, metric, kernel, monkeypatch):
    if not kernel:
        monkeypatch.setattr("torch_ivf_module.functional.kernels.KERNELS", [])
    for name, transform in TRANSFORMS.items():
        index, search = index_and_search(kind, metric)  # new, so that its caches are empty
        for _ in range(2):
            torch.testing.assert_close(transform(search), transform(plain(metric)), rtol=1e-3, atol=1e-4, msg=name)
        store = index.store
        caches = (store.segments(), vars(store.ids), vars(store._updates), dict(index.named_buffers()))
        tensors = [part for part in tree_leaves(caches) if isinstance(part, torch.Tensor)]
        assert tensors, name
        assert not any(map(torch._C._functorch.is_functorch_wrapped_tensor, tensors)), name
        torch.testing.assert_close(index.search(Q, K)[0], plain(metric)(Q), rtol=1e-4, atol=1e-4)


def test_finite_differences():
    grid = torch.cartesian_prod(torch.arange(0.0, 9, 3), torch.arange(0.0, 9, 3))
    index = IndexFlatL2(2)
    index.add(grid)
    x = (grid[[0, 4]] + torch.tensor([0.5, 0.3])).double().requires_grad_()

    def distances(x):
        return index.search(x, 3)[0].double().square()

    # The search computes in float32, so the steps are wide; the function is a polynomial of degree four.
    assert torch.autograd.gradcheck(distances, (x,), eps=1e-2, atol=0.05, rtol=0.05, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(distances, (x,), eps=1e-2, atol=0.05, rtol=0.05)


def test_padding_has_a_gradient_of_zero():
    index = IndexFlatL2(2)
    index.add(torch.tensor([[1.0, 2.0]]))
    x = torch.tensor([[0.0, 0.0], [torch.nan, 1.0]], requires_grad=True)
    found, ids = index.search(x, 3)
    assert ids.tolist() == [[0, -1, -1], [-1, -1, -1]]
    found[ids >= 0].sum().backward()
    assert x.grad.tolist() == [[-2.0, -4.0], [0.0, 0.0]]


def test_negative_ids_are_no_padding():
    index = IndexFlatL2(2)
    index.add_with_ids(torch.eye(2), torch.tensor([-7, -2]))
    found, ids = index.search(torch.tensor([[0.0, 0.9]], requires_grad=True), 3)
    assert ids.tolist() == [[-2, -7, -1]]
    assert found.requires_grad


def test_vectors_found_inside_a_transform():
    index, _ = index_and_search("ivf", "l2")
    found = vmap(lambda x: index.search_and_reconstruct(x[None], K))(Q)
    for part, expected in zip(found, index.search_and_reconstruct(Q, K), strict=True):
        torch.testing.assert_close(part[:, 0], expected)


def test_lists_are_sorted_by_a_search_inside_a_transform():
    index = IndexIVFFlat(D, nlist=3, nprobe=2)
    index.train(X).add(X)
    params = SearchParams(rebuild_policy="auto_threshold")
    expected = grad(lambda x: index.search(x, K)[0].sum())(Q)
    found = grad(lambda x: index.search(x, K, params=params)[0].sum())(Q)
    assert index.list_ordering == "residual_norm_asc"
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    index.fit(X)
    vmap(lambda x: index.search(x[None], K, params=params)[0])(Q)
    assert index.list_ordering == "residual_norm_asc"
    index.search(Q, K)  # no buffer belongs to the transform that has ended


def test_functional_call_with_pending_rows():
    index, _ = index_and_search("flat", "l2")
    model = nn.Sequential(nn.Linear(D, D), index)
    weights = dict(model.named_parameters())
    index.add(X[:5] + 9)

    def loss(weights):
        return functional_call(model, weights, (Q,))[0].sum()

    found = grad(loss)(weights)
    loss({name: weight.detach().requires_grad_() for name, weight in weights.items()})
    model(Q)[0].sum().backward()
    for name, weight in model.named_parameters():
        torch.testing.assert_close(found[name], weight.grad)
    index.add(X[:5] + 19)
    grad(lambda x: x.sum() + index.list_ids.sum())(Q)  # packs
    assert index.search(X[:5] + 19, 1)[1][:, 0].tolist() == list(range(405, 410))


def swapped(module, name, tensor, x=Q):
    """D of a search in which a buffer of the index is replaced by `tensor`."""
    return functional_call(module, {name: tensor}, (x,))[0]


@pytest.mark.parametrize("kind", ["flat", "ivf"])
@pytest.mark.parametrize("name", ["centroids", "packed_embeddings"])
def test_a_derivative_with_respect_to_a_buffer_is_refused(kind, name):
    index, _ = index_and_search(kind, "l2")
    buffer = getattr(index, name).clone()
    refusal = pytest.raises(RuntimeError, match=rf"{name} requires grad or is a dual tensor, .* x alone: detach it")
    for x in (Q, Q.clone().requires_grad_()):
        with refusal:
            swapped(index, name, buffer.clone().requires_grad_(), x)
        with forward_ad.dual_level(), refusal:
            swapped(index, name, forward_ad.make_dual(buffer, buffer), x)
    with pytest.raises(RuntimeError, match=rf"{name} belongs to a torch.func transform"):
        grad(lambda buffer: swapped(index, name, buffer).sum())(buffer)
    with torch.no_grad():
        torch.testing.assert_close(swapped(index, name, buffer.clone().requires_grad_()), index(Q)[0])
    torch.testing.assert_close(swapped(index, name, buffer), index(Q)[0])


def test_derivatives_of_a_graph_with_respect_to_its_buffers_are_correct_or_refused():
    graph = index_and_search("flat", "l2")[0].graph(k=K)
    buffer = graph.packed_embeddings.clone().requires_grad_()
    swapped(graph, "packed_embeddings", buffer).sum().backward()
    rows = X.clone().requires_grad_()
    (Q[:, None, :] - rows).square().sum(-1).topk(K, largest=False)[0].sum().backward()
    torch.testing.assert_close(buffer.grad, rows.grad, rtol=1e-4, atol=1e-4)
    refusal = pytest.raises(RuntimeError, match=r"packed_embeddings requires grad or is a dual tensor, .*detach it")
    with refusal:
        swapped(graph, "packed_embeddings", buffer, Q.clone().requires_grad_())
    with refusal:
        grad(lambda buffer: swapped(graph, "packed_embeddings", buffer).sum())(X)
    with refusal:
        jvp(lambda buffer: swapped(graph, "packed_embeddings", buffer), (X,), (X,))


def test_the_state_of_an_index_inside_a_transform():
    index, _ = index_and_search("ivf", "l2")
    state, expected = dict(index.state_dict()), grad(lambda x: index(x)[0].sum())(Q)
    for given in (lambda: state, lambda: dict(index.named_buffers())):
        found = grad(lambda x, given=given: functional_call(index, given(), (x,))[0].sum())(Q)
        torch.testing.assert_close(found, expected)
    with pytest.raises(RuntimeError, match=r"state_dict\(\) inside .* take it outside, or use dict\(model.named_buf"):
        grad(lambda x: functional_call(index, dict(index.state_dict()), (x,))[0].sum())(Q)


def test_range_search_has_no_derivative():
    index, _ = index_and_search("ivf", "l2")
    x = Q.clone().requires_grad_()
    assert not index.range_search(x, 9.0)[1].requires_grad
    with forward_ad.dual_level(), pytest.raises(RuntimeError, match="range_search has no derivative"):
        index.range_search(forward_ad.make_dual(Q, V), 9.0)


REFUSED = {
    "add": lambda index: vmap(index.add)(Q[None]),
    "remove_ids": lambda index: grad(lambda x: index.remove_ids(torch.arange(3)) * x.sum())(Q),
    "range_search": lambda index: grad(lambda x: index.range_search(x, 9.0)[1].sum())(Q),
    "reconstruct": lambda index: vmap(lambda x: index.reconstruct(0) + x)(Q),
    "list_ids": lambda index: vmap(lambda ids: functional_call(index, {"list_ids": ids}, (Q,))[1])(
        torch.stack([index.list_ids] * 2)
    ),
    "selector": lambda index: vmap(lambda chosen: index.search(Q, 1, params=SearchParams(selector=chosen))[0])(
        torch.ones(2, 5, dtype=torch.bool)
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_unsupported_calls_inside_transforms_are_refused(name):
    index, _ = index_and_search("flat", "l2")
    with pytest.raises((RuntimeError, ValueError), match=rf"{name}.* torch\.func"):
        REFUSED[name](index)
    assert index.ntotal == 400
    assert index.search(X, 1)[1][:, 0].tolist() == list(range(400))
