"""A selector and exclusions for each query in graphs, exported files and compiled models."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from tests.graphs import D, K, index_of, queries, same
from tests.problems import each_metric
from torch_ivf_module import IndexFlatL2, IndexPreTransform, SearchParams, export
from torch_ivf_module.index.operator import _FIELDS, _settings_of
from torch_ivf_module.params import DEFAULTS

M = 12  # excluded ids of a query
search = torch.ops.torch_ivf_module.search.default
each_layout = pytest.mark.parametrize("layout", ["rows", "tiles"])


def masks(n: int, size: int = 1000) -> torch.Tensor:
    mask = torch.rand(n, size, generator=torch.Generator().manual_seed(1)) < 0.3
    mask[:1] = False
    return mask


def exclusions(n: int) -> torch.Tensor:
    """Half of what is found, and ids that no row has."""
    found = index_of().search(queries(n), M)[1]
    return torch.where(torch.rand(found.shape, generator=torch.Generator().manual_seed(2)) < 0.5, found, -1)


@each_layout
@each_metric
def test_a_graph_answers_as_search(metric, layout):
    index = index_of(metric)
    x = queries()
    graph = index.graph(layout=layout)
    same(graph(x, masks(30)), index.search(x, K, params=SearchParams(selector=masks(30))))
    excluding = index.graph(layout=layout, exclude=M)
    same(excluding(x, exclude=exclusions(30)), index.search(x, K, params=SearchParams(exclude=exclusions(30))))
    both = SearchParams(selector=masks(30), exclude=exclusions(30))
    same(excluding(x, masks(30), exclusions(30)), index.search(x, K, params=both))
    for mask in (masks(30)[:, :0], masks(30, 3)):
        same(graph(x, mask), index.search(x, K, params=SearchParams(selector=mask)))
    leading = graph(x.view(5, 6, D), masks(30).view(5, 6, -1))
    same([part.flatten(0, 1) for part in leading], graph(x, masks(30)))
    leading = excluding(x.view(5, 6, D), exclude=exclusions(30).view(5, 6, -1))
    same([part.flatten(0, 1) for part in leading], excluding(x, exclude=exclusions(30)))


@each_layout
def test_all_rows_of_an_excluded_id_are_left_out(layout):
    index = IndexFlatL2(D, k=3)
    x = queries(50, seed=1)
    index.add(x)
    index.add_with_ids(x[:1].repeat(20, 1) + 0.001 * queries(20), torch.full((20,), 7))
    exclude = torch.tensor([[7, 0, -1], [-1, -1, -1]])
    graph = index.graph(exclude=3, layout=layout)
    params = SearchParams(exclude=exclude)
    same(graph(x[:2], exclude=exclude), index.search(x[:2], 3, params=params))
    same(graph(x[:2], exclude=exclude.int()), index.search(x[:2], 3, params=params))
    everything = torch.arange(50).expand(2, -1)
    assert (index.graph(exclude=50, layout=layout)(x[:2], exclude=everything)[1] == -1).all()


def test_gradients_and_batches_of_a_graph():
    index, x = index_of(), queries(6)
    graph = index.graph(exclude=M)
    for given in (x.clone().requires_grad_(), x):
        if given.requires_grad:
            graph(given, masks(6), exclusions(6))[0].nan_to_num(posinf=0).sum().backward()
            slopes = given.grad
        else:
            other = x.clone().requires_grad_()
            params = SearchParams(selector=masks(6), exclude=exclusions(6))
            index.search(other, K, params=params)[0].nan_to_num(posinf=0).sum().backward()
            torch.testing.assert_close(slopes, other.grad, rtol=1e-4, atol=1e-4)
    batch, mask, exclude = queries(18).view(3, 6, D), masks(6), exclusions(6)
    found = torch.func.vmap(lambda x: graph(x, mask, exclude))(batch)
    expected = [graph(part, mask, exclude) for part in batch]
    same([part.flatten(0, 1) for part in found], [torch.cat(parts) for parts in zip(*expected, strict=True)])


def test_wrong_inputs_of_a_graph():
    graph, x = index_of().graph(exclude=2), queries(4)
    good = torch.full((4, 2), -1)
    for mask, exclude, error, match in (
        (None, None, ValueError, "exclude must be passed if the graph was made by"),
        (None, good[:, :1], ValueError, r"exclude must have 2 columns, got shape \(4, 1\)"),
        (None, good[:3], ValueError, r"exclude must have shape \(4, 2\), got \(3, 2\)"),
        (None, good.float(), TypeError, r"exclude must be int64"),
        (masks(3), good, ValueError, r"mask must have shape \(4, n\), got \(3, 1000\)"),
        (good, good, TypeError, r"mask must be a bool mask"),
    ):
        with pytest.raises(error, match=match):
            graph(x, mask, exclude)
    with pytest.raises(ValueError, match="exclude must be passed if the graph was made by"):
        index_of().graph()(x, exclude=good)
    with pytest.raises(ValueError, match="exclude must be >= 1"):
        index_of().graph(exclude=0)
    with pytest.raises(ValueError, match="does not support exclude"):
        export.to_torchscript(graph, "nowhere.pt", search_mode="csr")
    assert "exclude=2" in repr(graph)
    assert index_of().store.graph is not graph


# --- files --------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("layout", ["rows", pytest.param("tiles", marks=pytest.mark.long)])
@pytest.mark.parametrize("format", ["torchscript", "exported", "onnx", pytest.param("aoti", marks=pytest.mark.long)])
def test_files_take_masks_and_exclusions(format, layout, tmp_path):
    if format == "onnx":
        pytest.importorskip("onnxscript")
    index, suffix = index_of(), {"onnx": "onnx", "torchscript": "pt"}.get(format, "pt2")
    excluding = index.graph(layout=layout, exclude=M)
    sizes = {} if format == "torchscript" else {"mask": 1000, "per_query": True}
    write, plain = export.FORMATS[format], index.graph(layout=layout)
    run = export.runner(write(excluding, tmp_path / f"a.{suffix}", **sizes), format)
    only = export.runner(write(excluding, tmp_path / f"b.{suffix}"), format)
    masked = export.runner(write(plain, tmp_path / f"c.{suffix}", **sizes), format)
    for n in (2, 30):
        x = queries(n)
        same(run(x, masks(n), exclude=exclusions(n)), excluding(x, masks(n), exclusions(n)))
        same(only(x, exclude=exclusions(n)), excluding(x, exclude=exclusions(n)))
        same(masked(x, masks(n)), plain(x, masks(n)))


class Excludes(nn.Module):
    """A model that hands exclusions on."""

    def __init__(self, graph: nn.Module) -> None:
        super().__init__()
        self.encoder, self.index = nn.Linear(D, D), graph

    def forward(self, x: torch.Tensor, exclude: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        found: tuple[torch.Tensor, torch.Tensor] = self.index(self.encoder(x), exclude=exclude)
        return found


@pytest.mark.filterwarnings("ignore")
def test_a_users_model_with_exclusions(tmp_path):
    model = Excludes(index_of().graph(exclude=M)).eval()
    path = export.to_exported(model, tmp_path / "model.pt2", example=queries(2), exclude=M)
    same(export.runner(path, "exported")(queries(9), exclude=exclusions(9)), model(queries(9), exclusions(9)))
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend="aot_eager")
    for n in (9, 30):
        same(compiled(queries(n), exclusions(n)), model(queries(n), exclusions(n)))


# --- the operator -------------------------------------------------------------------------------------------

CHOSEN = {
    "masks": lambda n: {"selector": masks(n)},
    "lists": lambda n: {"selector": [torch.arange(q, 900, 7) for q in range(n)]},
    "exclude": lambda n: {"exclude": exclusions(n)},
    "lists, exclude": lambda n: {"selector": [torch.arange(q, 900, 7) for q in range(n)], "exclude": exclusions(n)},
}
each_choice = pytest.mark.parametrize("name", CHOSEN)


@each_choice
@pytest.mark.parametrize("transform", [False, True])
def test_a_compiled_model_answers_as_search(name, transform):
    torch._dynamo.reset()
    index = index_of()
    searched = IndexPreTransform(D, nn.Identity(), index) if transform else index

    def model(x, selector, exclude):
        return searched.search(x, K, params=SearchParams(selector=selector, exclude=exclude))

    fast = torch.compile(model, fullgraph=True, dynamic=True, backend="aot_eager")
    for n in (4, 30):
        chosen = {"selector": None, "exclude": None, **CHOSEN[name](n)}
        same(fast(queries(n), **chosen), model(queries(n), **chosen))
    slopes = []
    for called in (fast, model):
        x = queries(30).requires_grad_()
        called(x, **chosen)[0].nan_to_num(posinf=0).sum().backward()
        slopes.append(x.grad)
    torch.testing.assert_close(*slopes, rtol=1e-4, atol=1e-4)


@each_choice
def test_the_operator_is_search_and_its_registrations_are_consistent(name):
    index, x = index_of(), queries(4)
    params = SearchParams(**CHOSEN[name](4))
    arguments = (x, index._handle, K, True, *_settings_of(params))
    same(search(*arguments)[:2], index.search(x, K, params=params))
    torch.library.opcheck(search, arguments, test_utils=("test_schema", "test_faketensor"))
    batch = queries(12).view(3, 4, D)
    found = torch.func.vmap(lambda x: search(x, *arguments[1:]))(batch)
    expected = [index.search(part, K, params=params) for part in batch]
    same([part.flatten(0, 1) for part in found[:2]], [torch.cat(parts) for parts in zip(*expected, strict=True)])


def test_batches_of_filters_are_refused_by_the_operator():
    index = index_of()
    at = list(_FIELDS).index("exclude")
    settings = _settings_of(DEFAULTS)

    def one(x, exclude):
        return search(x, index._handle, K, False, *settings[:at], exclude, *settings[at + 1 :])[0]

    with pytest.raises(RuntimeError, match="batches of x alone under vmap, not of selector or exclude"):
        torch.func.vmap(one)(queries(8).view(2, 4, D), torch.full((2, 4, 3), -1))
