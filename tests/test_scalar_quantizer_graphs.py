"""Graphs, exported files and compiled models of indexes of codes."""

from __future__ import annotations

import itertools
from functools import cache

import pytest
import torch
from torch import nn
from torch._inductor import config as inductor

from tests.datasets import normal
from tests.graphs import GRAPHS, Model, same
from tests.oracle import agree
from tests.problems import each_bits, each_metric
from torch_ivf_module import IndexIVFScalarQuantizer, IndexScalarQuantizer, SearchParams, export, native
from torch_ivf_module.functional.row_codes import width

D, K = 12, 5
compiles = pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning", "ignore:.*torch.jit:FutureWarning")


@cache
def index_of(bits: int, metric: str = "l2", d: int = D) -> IndexIVFScalarQuantizer:
    x = normal(900, d, seed=3)
    index = IndexIVFScalarQuantizer(d, nlist=9, nprobe=3, metric=metric, k=K, bits=bits)
    index.train(x[:400]).add(x)
    index.add(x[:300] * 0.01 + x[0])
    index.add_with_ids(x[:50] + 0.5, torch.arange(50) + (1 << 40))
    return index


def queries(n: int = 30, d: int = D) -> torch.Tensor:
    return normal(n, d, seed=4)


@each_bits
@each_metric
@pytest.mark.parametrize("d", [D, 7])  # of an odd d half a byte is unused
@pytest.mark.parametrize("name", GRAPHS)
def test_a_graph_answers_as_search(name, d, metric, bits):
    index, settings, x = index_of(bits, metric, d), dict(GRAPHS[name]), queries(d=d)
    graph = index.graph(**settings)
    params = SearchParams(nprobe=settings.get("nprobe"), max_codes=settings.get("max_codes"))
    expected = index.search(x, settings.get("k", K), params=params)
    if name == "half":  # scans and returns float16 copies of the decoded vectors
        agree(graph(x), expected, rtol=1e-2, atol=1e-2)
    else:
        same(graph(x), expected)
    y = x.clone().requires_grad_()
    same(graph(y), graph(x))


@each_bits
def test_a_graph_takes_about_the_memory_of_the_codes(bits):
    index = IndexScalarQuantizer(128, bits)
    index.add(normal(2000, 128))
    graph = index.graph(k=3)
    shared = {index.list_ids.data_ptr(), index.list_offsets.data_ptr()}
    own = sum(part.nbytes for part in graph.buffers() if part.data_ptr() not in shared)
    assert own < 2000 * (width(128, bits) + 5) + 3000  # and the bias of each row, and the coarse quantizer
    assert graph.half().row_codes.dtype == torch.uint8
    assert graph.row_ranges.dtype == torch.float32


def test_a_graph_is_outdated_after_a_change():
    index = IndexScalarQuantizer(4, k=1)
    index.add(normal(9, 4))
    graph = index.graph()
    index.remove_ids(torch.tensor([3]))
    with pytest.raises(RuntimeError, match="changed"):
        graph(normal(2, 4))


@pytest.mark.filterwarnings("ignore")  # of the exporters
@pytest.mark.parametrize(
    ("format", "metric", "bits"),
    [
        *itertools.product(("torchscript", "exported", "onnx"), ("l2", "cosine"), (8, 4)),
        *(pytest.param("aoti", "l2", bits, marks=pytest.mark.long) for bits in (8, 4)),
    ],
)
def test_files_answer_as_search(format, metric, bits, tmp_path):
    d = 7  # odd
    pytest.importorskip("onnxscript" if format == "onnx" else "torch")
    index = index_of(bits, metric, d)
    faster = {"aot_inductor.precompile_headers": False, "aot_inductor.compile_wrapper_opt_level": "O0"}
    with inductor.patch(faster):
        path = export.FORMATS[format](index.graph(), tmp_path / "search.pt2")
    run = export.runner(path, format)
    for n in (7, 1, 2, 30):
        same(run(queries(n, d)), index.search(queries(n, d), K))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("format", ["torchscript", "exported", "onnx"])
def test_files_take_a_mask(format, tmp_path):
    pytest.importorskip("onnxscript" if format == "onnx" else "torch")
    mask = torch.rand(1000, generator=torch.Generator().manual_seed(1)) < 0.1
    graph = index_of(4).graph()
    settings = {} if format == "torchscript" else {"mask": 1000}
    path = export.FORMATS[format](graph, tmp_path / "search.pt2", **settings)
    same(export.runner(path, format)(queries(), mask), graph(queries(), mask))


@each_bits
@each_metric
def test_scripted_list_major_search(metric, bits, tmp_path):
    index = index_of(bits, metric)
    path = export.to_torchscript(index.graph(), tmp_path / "lists.pt", search_mode="csr")
    run = export.runner(path, "torchscript")
    for n in (1, 30, 600, 0):
        same(run(queries(n)), index.search(queries(n), K))


@compiles
@each_bits
def test_a_compiled_graph_and_gradients(bits):
    torch._dynamo.reset()
    model = Model(index_of(bits).graph())
    fast = torch.compile(model, fullgraph=True, dynamic=True, backend="aot_eager")
    x = normal(20, 6)
    for part, expected in zip(fast(x), model(x), strict=True):
        torch.testing.assert_close(part, expected, rtol=1e-4, atol=1e-4)
    fast(x)[0].square().sum().backward()
    gradient = model.encoder.weight.grad.clone()
    model.zero_grad()
    model(x)[0].square().sum().backward()
    torch.testing.assert_close(gradient, model.encoder.weight.grad, rtol=1e-4, atol=1e-4)


@compiles
@each_bits
def test_a_compiled_model_calls_the_operator(bits):
    torch._dynamo.reset()
    index = IndexIVFScalarQuantizer(D, nlist=6, nprobe=3, bits=bits, k=K).train(normal(300, D))
    index.add(normal(300, D))
    model = nn.Sequential(nn.Linear(D, D), index)
    fast = torch.compile(model, fullgraph=True, dynamic=True, backend="aot_eager")
    x = queries()
    agree(fast(x), model(x), rtol=1e-4, atol=1e-4)
    index.add(model[0](x).detach())
    assert torch.equal(fast(x)[1][:, 0], torch.arange(300, 330))
    fast(x)[0].sum().backward()
    gradient = model[0].weight.grad.clone()
    model.zero_grad()
    model(x)[0].sum().backward()
    torch.testing.assert_close(gradient, model[0].weight.grad, rtol=1e-4, atol=1e-4)


@pytest.mark.filterwarnings("ignore")
@each_bits
def test_torch_export_of_a_model_calls_the_operator_of_the_kernel(bits):
    index = index_of(bits)
    model = nn.Sequential(nn.Identity(), index)
    with native.disabled(), pytest.raises(RuntimeError, match=r"index\.graph"):
        torch.export.export(model, (queries(),))
    if native.available():
        program = torch.export.export(model, (queries(),)).module()
        same(program(queries()), index.search(queries(), K))
