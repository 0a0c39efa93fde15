"""SearchGraph under torch.compile, alone and in a model."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from tests.graphs import D, K, Model, alike, index_of, queries, same
from torch_ivf_module import IndexFlatL2

# Records, differentiates and guards as the default backend does, but without a C++ compiler.
RECORDS = "aot_eager"
# The compiler uses functions that PyTorch has deprecated.
compiles = pytest.mark.filterwarnings(
    "ignore:.*torch.jit:DeprecationWarning",  # torch 2.13
    "ignore:.*torch.jit:FutureWarning",  # torch 2.14
)


def compiled(model: nn.Module, **settings) -> nn.Module:
    torch._dynamo.reset()
    return torch.compile(model, fullgraph=True, **settings)


def answers_as_search(fast, model: Model, x: torch.Tensor) -> None:
    D_, I = index_of().search(model.encoder(x), K)
    alike(fast(x), (model.head(D_), I))


@compiles
@pytest.mark.parametrize("layout", ["rows", "tiles"])
def test_compiled_with_a_dynamic_batch_and_gradients(layout):
    model = Model(index_of().graph(layout=layout))
    fast = compiled(model, dynamic=True)
    x = torch.randn(30, 6)
    with torch._dynamo.config.patch(error_on_recompile=True):  # one compilation serves every size but 1
        for n in (30, 7, 2):
            answers_as_search(fast, model, x[:n].clone())
    fast(x.clone())[0].square().sum().backward()
    gradient = model.encoder.weight.grad.clone()
    model.zero_grad()
    model(x)[0].square().sum().backward()
    assert gradient.abs().max() > 0
    torch.testing.assert_close(gradient, model.encoder.weight.grad, rtol=1e-4, atol=1e-4)


@compiles
@pytest.mark.parametrize("layout", [pytest.param("rows", marks=pytest.mark.long), "tiles"])
def test_compiled_for_a_batch_of_one(layout):
    """Torch compiles batch size 1 separately; here without gradients."""
    model = Model(index_of().graph(layout=layout))
    with torch.no_grad():
        answers_as_search(compiled(model, dynamic=True), model, torch.randn(1, 6))


@compiles
def test_an_index_compiles_after_graph_has_been_called():
    index = IndexFlatL2(D, k=K)
    index.add(queries(50, seed=1))
    index.graph()
    fast = compiled(index, dynamic=True, backend=RECORDS)
    same(fast(queries()), index.search(queries(), K))
    index.add(queries(50, seed=2))  # which drops the graph
    same(fast(queries()), index.search(queries(), K))
    index.graph()
    same(fast(queries()), index.search(queries(), K))
    index.k = 2
    index.graph(k=1)  # with other settings than the index's, so that it is not used for the index
    index.graph()
    same(fast(queries()), index.search(queries(), 2))


@compiles
def test_a_compiled_graph_raises_if_its_index_has_changed():
    index = IndexFlatL2(D)
    index.add(queries(50, seed=1))
    fast = compiled(index.graph(k=1), backend=RECORDS)
    fast(queries())
    index.add(queries(1))
    with pytest.raises((RuntimeError, torch._dynamo.exc.Unsupported)):
        fast(queries())
