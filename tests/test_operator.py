"""torch.ops.torch_ivf_module.search: what torch.compile and torch.export record of a model that searches an index."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend

from tests.datasets import normal
from tests.problems import each_metric
from torch_ivf_module import IndexFlat, IndexFlatL2, IndexIVFFlat, IndexPreTransform, SearchParams, native
from torch_ivf_module.index.operator import _FIELDS
from torch_ivf_module.params import DEFAULTS

D, K = 8, 5
X = normal(600, D)
search = torch.ops.torch_ivf_module.search.default
pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")


def arguments(index, x, k=K, with_vectors=False, **settings):
    values = [settings.get(name, getattr(DEFAULTS, name, None)) for name in _FIELDS]
    return (x, index._handle, k, with_vectors, *values)


def filled(metric="l2", flat=False):
    index = IndexFlat(D, metric=metric, k=K) if flat else IndexIVFFlat(D, nlist=8, nprobe=3, metric=metric, k=K)
    index.train(X).add(X)
    return index


def compiled(model, **settings):
    """The model in one graph, and a counter of its compilations."""
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    return torch.compile(model, fullgraph=True, backend=counter, **settings), counter


def same(found, expected):
    for part, other in zip(found, expected, strict=True):
        torch.testing.assert_close(part, other, rtol=1e-4, atol=1e-4, equal_nan=True)


# -- the operator by itself ------------------------------------------------------------------------------------------


@each_metric
def test_it_is_search(metric):
    index = filled(metric)
    same(search(*arguments(index, X[:9]))[:2], index.search(X[:9], K))
    same(search(*arguments(index, X[:9], with_vectors=True)), index.search_and_reconstruct(X[:9], K))
    params = SearchParams(nprobe=1, selector=torch.arange(0, 600, 2), max_codes=100)
    settings = {"nprobe": 1, "selector": torch.arange(0, 600, 2), "max_codes": 100}
    same(search(*arguments(index, X[:9], **settings))[:2], index.search(X[:9], K, params=params))


@each_metric
@pytest.mark.parametrize("with_vectors", [False, True])
def test_its_registrations_are_consistent(metric, with_vectors):
    index = filled(metric)
    torch.library.opcheck(search, arguments(index, X[:4].clone(), with_vectors=with_vectors))
    if with_vectors:
        torch.library.opcheck(search, arguments(index, X[:4].clone().requires_grad_(), with_vectors=True))


@each_metric
def test_its_derivative_is_that_of_search(metric):
    index, gradients = filled(metric), []
    weights = torch.rand(6, K)
    for call in (lambda x: search(*arguments(index, x, with_vectors=True))[0], lambda x: index.search(x, K)[0]):
        x = X[:6].clone().requires_grad_()
        (weights * call(x)).sum().backward()
        gradients.append(x.grad)
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-4)
    x = X[:6].clone().requires_grad_()
    with pytest.raises(RuntimeError, match="with_vectors=True"):
        search(*arguments(index, x))[0].sum().backward()


def test_padding_has_no_derivative():
    index = IndexFlatL2(2)
    index.add(torch.eye(2))
    x = torch.tensor([[1.0, 1.0], [torch.nan, 0.0]], requires_grad=True)
    D, I, _ = search(*arguments(index, x, with_vectors=True))
    assert (I[:, 2:] == -1).all()
    torch.where(D.isinf(), 0, D).sum().backward()
    torch.testing.assert_close(x.grad, torch.tensor([[2.0, 2.0], [0.0, 0.0]]))


def test_the_derivatives_of_equal_distances_are_in_their_order():
    index = IndexFlatL2(64)
    index.add(torch.cat([torch.eye(64), -torch.eye(64)]))
    x, weights = torch.zeros(1, 64, requires_grad=True), torch.rand(1, 128)
    distances, _, vectors = search(*arguments(index, x, 128, with_vectors=True))
    assert distances.unique().tolist() == [1.0]
    (weights * distances).sum().backward()
    torch.testing.assert_close(x.grad, -2 * (weights[..., None] * vectors).sum(1))


def test_moving_an_index_frees_the_buffers_from_before():
    index = filled()
    before = weakref.ref(index.packed_embeddings)
    index.half()
    assert before() is None


def test_vmap_is_one_search_of_all_batch_entries():
    index = filled()
    batch = X[:12].view(3, 4, D)
    call = torch.func.vmap(lambda x: search(*arguments(index, x, with_vectors=True)))
    same([part.flatten(0, 1) for part in call(batch)], index.search_and_reconstruct(X[:12], K))


@pytest.mark.filterwarnings("ignore:.*torch.jit")
def test_forward_mode_raises():
    index = filled()
    with pytest.raises(RuntimeError, match="forward mode"):
        torch.func.jvp(lambda x: search(*arguments(index, x, with_vectors=True))[0], (X[:2],), (X[:2],))


def test_an_index_that_is_gone_or_copied():
    index = filled()
    twin = pickle.loads(pickle.dumps(copy.deepcopy(index)))
    assert twin._handle != index._handle
    twin.add(X[:1] + 100)
    handle = index._handle
    assert int(search(*arguments(twin, X[:1] + 100, 1))[1]) == 600
    del index
    gc.collect()
    with pytest.raises(RuntimeError, match="has been deleted"):
        search(X[:1], handle, *arguments(twin, X[:1])[2:])


# -- compiled models -------------------------------------------------------------------------------------------------

MODELS = {
    "index": lambda metric: filled(metric),
    "encoder": lambda metric: nn.Sequential(nn.Linear(D, D), filled(metric, flat=True)),
    "transform": lambda metric: IndexPreTransform(D, nn.Linear(D, D).requires_grad_(False), filled(metric)),
}


@pytest.mark.parametrize("kernel", [True, False])
@pytest.mark.parametrize("name", MODELS)
def test_changes_of_the_index_compile_nothing(name, kernel, monkeypatch):
    if not kernel:
        monkeypatch.setattr("torch_ivf_module.functional.kernels.KERNELS", [])
    model = MODELS[name]("l2")
    index = next(part for part in model.modules() if isinstance(part, (IndexFlat, IndexIVFFlat)))
    fast, counter = compiled(model, dynamic=True)
    for n in (4, 300, 1, 7):
        same(fast(X[:n]), model(X[:n]))
    compilations = counter.frame_count
    index.add(X[:40] + 0.1)
    same(fast(X[:9]), model(X[:9]))
    index.remove_ids(range(30))
    index.update([40], X[:1])
    same(fast(X[:9]), model(X[:9]))
    index.train(X[200:])
    index.reset()
    index.add(X[:50])
    same(fast(X[:9]), model(X[:9]))
    index.load_state_dict(filled(flat=index.store.flat).state_dict())
    same(fast(X[:9]), model(X[:9]))
    assert counter.frame_count == compilations


class Searches(nn.Module):
    """A model that gives settings to its searches."""

    def __init__(self, index):
        super().__init__()
        self.encoder, self.index = nn.Linear(D, D), index

    def forward(self, x, selector):
        x = self.encoder(x)
        found, ids = self.index.search(x, K, params=SearchParams(nprobe=2, selector=selector))
        vectors = self.index.search_and_reconstruct(x, 2, params=SearchParams(profile="exact"))[2]
        return found * 2 + vectors.square().sum(), ids


@each_metric
def test_settings_and_gradients_of_a_compiled_model(metric):
    model, selector = Searches(filled(metric)), torch.arange(0, 600, 2)
    fast, _ = compiled(model)
    same(fast(X[:9], selector), model(X[:9], selector))
    gradients = []
    for called in (fast, model):
        model.zero_grad()
        called(X[:9], selector)[0].square().mean().backward()
        gradients.append(model.encoder.weight.grad.clone())
    assert gradients[1].abs().max() > 0
    torch.testing.assert_close(*gradients, rtol=1e-3, atol=1e-3)


def test_leading_dimensions_and_half_precision():
    index = filled()
    fast, _ = compiled(index)
    x = X[:12].view(3, 4, D).half()
    same(fast(x), index(x))
    assert fast(x)[0].shape == (3, 4, K)


def test_wrong_shapes_are_named():
    fast, _ = compiled(filled())
    with pytest.raises(Exception, match=r"x must have shape \(\.\.\., 8\), got"):
        fast(torch.zeros(4, 2 * D))
    index = filled()
    fast, _ = compiled(lambda x: index.search(x, 2))
    with pytest.raises(Exception, match=r"x must have shape \(n, 8\), got"):
        fast(torch.zeros(4, 2 * D))


def test_torch_func_inside_of_a_compiled_function():
    """Not in one graph, but with the same result."""
    torch._dynamo.reset()
    index = filled()

    @torch.compile(backend="aot_eager")
    def slopes(x):
        return torch.func.grad(lambda x: index.search(x, K)[0].sum())(x)

    expected = torch.func.grad(lambda x: index.search(x, K)[0].sum())(X[:5] + 0.1)
    torch.testing.assert_close(slopes(X[:5] + 0.1), expected, rtol=1e-4, atol=1e-4)


# -- exported models -------------------------------------------------------------------------------------------------


def exported(model):
    return torch.export.export(model, (X[:4],), dynamic_shapes=({0: torch.export.Dim("n")},))


@pytest.mark.skipif(not native.available(), reason="the exported operator is the kernel's")
@each_metric
@pytest.mark.parametrize("flat", [False, True])
def test_an_exported_model_has_the_buffers_as_inputs(metric, flat):
    index = filled(metric, flat)
    index.add(X[:3] + 1)  # pending rows
    model = nn.Sequential(nn.Linear(D, D), index)
    for grad in (False, True):
        with torch.set_grad_enabled(grad):
            program = exported(model)
            assert {"1.packed_embeddings", "1.list_offsets", "1.list_ids"} <= set(program.state_dict)
            constants = sum(part.nbytes for part in program.constants.values() if isinstance(part, torch.Tensor))
            assert constants < index.packed_embeddings.nbytes
            for n in (2, 9, 60):
                same(program.module()(X[:n]), model(X[:n]))
    assert "search_index" in str(program)
    assert index.search(X[:3], 1)[1].shape == (3, 1)


@pytest.mark.skipif(not native.available(), reason="the exported operator is the kernel's")
@pytest.mark.filterwarnings("ignore")
def test_an_exported_model_compiles_ahead_of_time(tmp_path):
    model = nn.Sequential(nn.Linear(D, D), filled())
    with torch.no_grad():
        path = torch._inductor.aoti_compile_and_package(exported(model), package_path=str(tmp_path / "model.pt2"))
    run = torch._inductor.aoti_load_package(path)
    for n in (2, 30):
        same(run(X[:n]), model(X[:n]))


@pytest.mark.parametrize("params", [SearchParams(selector=[1]), SearchParams(profile="exact")])
def test_what_the_exported_operator_does_not_do_is_refused(params):
    index = filled()

    class Model(nn.Module):
        def forward(self, x):
            return index.search(x, 2, params=params)

    with pytest.raises(RuntimeError, match=r"index\.graph\("):
        torch.export.export(Model(), (X[:4],))


@pytest.mark.skipif(not native.available(), reason="the exported operator is the kernel's")
def test_an_exported_model_that_reconstructs():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.index = filled()

        def forward(self, x):
            return self.index.search_and_reconstruct(x, 3)

    model = Model()
    same(exported(model).module()(X[:9]), model(X[:9]))
    with pytest.raises(RuntimeError, match="trained index"):
        exported(nn.Sequential(IndexIVFFlat(D, nlist=2)))
