"""Models that hold an index under torch.compile, torch.fx, torch.jit.trace, torch.export and torch.onnx.export.

Here a search is one operator of the compiled graph; test_graph_compile.py has the search in PyTorch operations.
"""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.fx.experimental.proxy_tensor import make_fx

from tests.datasets import normal
from tests.problems import each_metric
from torch_ivf_module import IndexFlat, IndexFlatL2, IndexIVFFlat, IndexPreTransform
from torch_ivf_module.export import to_torchscript
from torch_ivf_module.graph import LAYOUTS

D, K = 8, 5
X = normal(600, D)
# The compiler reads .grad of every tensor, and uses functions that torch has deprecated.
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning"),  # of the calls of these tests, by torch 2.13
    pytest.mark.filterwarnings("ignore:.*torch.jit:FutureWarning"),  # and 2.14
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf"),
]


class Searches(nn.Module):
    """A model that calls other methods of an index than `forward`."""

    def __init__(self, index):
        super().__init__()
        self.encoder, self.index = nn.Linear(D, D), index

    def forward(self, x):
        x = self.encoder(x)
        found, ids = self.index.search(x, K)
        vectors = self.index.search_and_reconstruct(2 * x, 2)[2]
        return found * 2 + vectors.square().sum() + self.index.ntotal, ids


def flat(metric):
    index = IndexFlat(D, metric=metric, k=K)
    index.add(X)
    return index


def ivf(metric):
    index = IndexIVFFlat(D, nlist=8, nprobe=3, metric=metric, k=K).train(X)
    index.add(X)
    return index


MODELS = {
    "index": lambda: ivf("l2"),
    "encoder": lambda: nn.Sequential(nn.Linear(D, D), flat("ip")),
    "transform": lambda: IndexPreTransform(D, nn.Linear(D, D).requires_grad_(False), ivf("cosine")),
    "methods": lambda: Searches(ivf("l2")),
}


def index_in(model):
    return next(part for part in model.modules() if isinstance(part, (IndexFlat, IndexIVFFlat)))


@pytest.mark.parametrize(("name", "dynamic"), list(zip(MODELS, [True, None, True, None], strict=True)))
def test_compiled_without_preparation(name, dynamic):
    torch._dynamo.reset()
    model = MODELS[name]()
    index = index_in(model)
    fast = torch.compile(model, fullgraph=True, dynamic=dynamic, backend="aot_eager")

    def agree(x):
        for part, expected in zip(fast(x), model(x), strict=True):
            torch.testing.assert_close(part, expected, rtol=1e-4, atol=1e-4)

    for n in (4, 7, 1, 300):
        agree(X[:n])
    index.add(X[:20] + 0.1)
    agree(X[:9])
    index.remove_ids(range(30))
    agree(X[:9])
    index.update([40], X[:1])
    agree(X[:11])
    gradients = []
    for called in (fast, model):
        x = X[:6].clone().requires_grad_()
        called(x)[0].square().sum().backward()
        gradients.append(x.grad)
    assert gradients[1].abs().max() > 0
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-3)


def test_a_compiled_function_that_changes_an_index():
    torch._dynamo.reset()
    index = ivf("l2")

    @torch.compile(backend="aot_eager")
    def turn(x):
        y = 3 * x
        first = 100 * index.ntotal
        index.add_with_ids(y, torch.arange(first, first + y.shape[0]))
        index.update(torch.arange(first, first + 1), y[:1] + 1)
        removed = index.remove_ids(torch.arange(first + 1, first + 2))
        lims, _, ids = index.range_search(y[:1] + 1, 1e-3)
        return index.reconstruct(first) - y[0], removed, ids - first, index.list_sizes().sum() * lims[-1]

    for n, total in ((3, 602), (4, 605), (5, 609)):
        moved, removed, ids, count = turn(X[10 * n : 11 * n])  # other rows each time
        assert torch.allclose(moved, torch.ones(D), atol=1e-5)
        assert (removed, ids.tolist(), int(count), index.ntotal) == (1, [0], total, total)


# -- recorders -----------------------------------------------------------------------------------------------------


LAYERS = {
    "index": lambda: ivf("l2"),
    "graph": lambda: ivf("l2").graph(k=2),
    "transform": lambda: IndexPreTransform(D, nn.Identity(), flat("l2")),
}


@pytest.mark.parametrize("name", LAYERS)
def test_fx_records_one_call(name):
    layer = LAYERS[name]()

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.encoder, self.layer = nn.Linear(D, D), layer

        def forward(self, x):
            found, ids = self.layer(self.encoder(x))
            return found + 1, ids

    model = Model()
    traced = torch.fx.symbolic_trace(model)
    for n in (1, 3, 50):
        for part, expected in zip(traced(X[:n]), model(X[:n]), strict=True):
            assert part.equal(expected)
    assert [node.target for node in traced.graph.nodes if node.op == "call_module"] == ["encoder", "layer"]
    with pytest.raises(TypeError, match=r"a module that holds it, or index\.graph"):
        torch.fx.symbolic_trace(layer)


def test_fx_of_a_method():
    index = flat("l2")
    with pytest.raises(TypeError, match=r"x is a torch\.fx Proxy.*index\.graph"):
        torch.fx.symbolic_trace(lambda x: index.search(x, 2))


RECORDERS = {
    "jit.trace": lambda model: torch.jit.trace(model, X[:2]),
    "export, strict": lambda model: torch.export.export(model, (X[:2],), strict=True),
    "onnx by trace": lambda model: torch.onnx.export(model, (X[:2],), "unwritten.onnx", dynamo=False),
    "linearize": lambda model: torch.func.linearize(lambda x: model(x)[0], X[:2]),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("recorder", RECORDERS)
@pytest.mark.parametrize("name", ["index", "methods"])
def test_recording_one_batch_is_refused(name, recorder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model = nn.Sequential(MODELS[name]())
    with pytest.raises(Exception, match=r"index\.graph\("):
        RECORDERS[recorder](model)
    assert index_in(model).search(X[:3], 1)[1].flatten().tolist() == [0, 1, 2]


def test_a_traced_graph_serves_every_batch():
    index = IndexFlatL2(D, k=2)
    index.add(X)
    for shape in ((2, D), (2, 3, D)):
        traced = torch.jit.trace(index.graph(), torch.ones(shape))
        for n in (1, 2, 30):
            x = X[: 3 * n].view(-1, *shape[1:])
            for part, expected in zip(traced(x), index(x), strict=True):
                torch.testing.assert_close(part, expected)


@pytest.mark.parametrize("layout", LAYOUTS)
@each_metric
def test_a_trace_does_not_depend_on_grad_mode(metric, layout):
    encoder, graph = nn.Linear(D, D), ivf(metric).graph(layout=layout)
    model = nn.Sequential(encoder, graph)
    traced = torch.jit.trace(model, X[:2])  # which compares a recording with gradients with one without
    with torch.no_grad():
        plain = torch.jit.trace(model, X[:2])
    gradients = []
    for called in (model, traced, plain):
        encoder.zero_grad()
        found, ids = called(X[:30])
        found.sum().backward()
        gradients.append(encoder.weight.grad)
        with torch.no_grad():
            for part, expected in zip(called(X[:30]), (found, ids), strict=True):
                torch.testing.assert_close(part, expected)
    assert gradients[0].abs().max() > 0
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(gradients[2], gradients[0], rtol=1e-4, atol=1e-4)


CHANGES = {
    "add": lambda index, x: index.add(x),
    "add_with_ids": lambda index, x: index.add_with_ids(x, torch.arange(len(x))),
    "update": lambda index, x: index.update(torch.arange(len(x)), x),
    "remove_ids": lambda index, x: index.remove_ids(torch.arange(len(x))),
    "merge_from": lambda index, x: index.merge_from(IndexFlatL2(D)),
    "reset": lambda index, x: index.reset(),
    "fit": lambda index, x: index.train(x),
    "reconstruct": lambda index, x: index.reconstruct(0),
    "graph": lambda index, x: index.graph(),
    "rebuild_lists": lambda index, x: index.rebuild_lists(),
    "retrain": lambda index, x: index.retrain(),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", CHANGES)
def test_recording_a_change_is_refused(name):
    index = ivf("l2") if name.startswith("re") else flat("l2")
    if name == "fit":
        index = IndexIVFFlat(D, nlist=2)
    before = {key: value.clone() for key, value in index.state_dict().items()}

    def changes(x):
        CHANGES[name](index, x)
        return x + 1

    for record in (lambda: torch.jit.trace(changes, X[:4]), lambda: make_fx(changes)(X[:4])):
        with pytest.raises(RuntimeError, match=rf"{name} of an index cannot be recorded .*index\.graph\("):
            record()
    for key, value in index.state_dict().items():
        assert value.equal(before[key])


SCRIPTED = {
    "index": lambda: ivf("l2"),
    "flat": lambda: flat("ip"),
    "encoder": lambda: nn.Sequential(nn.Linear(D, D), flat("l2")),
    "transform": MODELS["transform"],
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", SCRIPTED)
def test_scripting_names_the_graph(name, tmp_path):
    with pytest.raises(RuntimeError, match=r"torch\.jit\.script cannot compile Index\w+: .*index\.graph\("):
        torch.jit.script(SCRIPTED[name]())
    with pytest.raises(RuntimeError, match=r"index\.graph\("):
        to_torchscript(SCRIPTED[name](), tmp_path / "model.ts")
    assert not list(tmp_path.iterdir())
