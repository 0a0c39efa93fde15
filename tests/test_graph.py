"""SearchGraph in eager mode: its answers are those of `search`; masks, errors, changes of the index."""

from __future__ import annotations

import copy
import pickle
from functools import partial

import pytest
import torch

from tests.graphs import GRAPHS, D, K, Model, index_of, queries, same
from tests.problems import each_flat_metric, each_metric, few_training_rows
from torch_ivf_module import IndexFlat, IndexFlatL2, IndexIVFFlat, export
from torch_ivf_module.graph import LAYOUTS


@each_metric
@pytest.mark.parametrize("name", GRAPHS)
def test_a_graph_answers_as_search(name, metric):
    index = index_of(metric)
    settings = GRAPHS[name]
    graph = index.graph(**settings)
    reference = index
    if settings.get("storage") and not settings.get("layout"):  # the graph searches a float16 copy
        reference = type(index)(**{**index.config(), "dtype": torch.float16})
        reference.load_state_dict(index.state_dict())
    before = reference.nprobe, reference.max_codes
    reference.nprobe, reference.max_codes = graph.nprobe, graph.max_codes
    expected = reference.search(queries(), graph.k)
    reference.nprobe, reference.max_codes = before
    tolerance = 2e-3 if settings.get("storage") else 1e-5
    torch.testing.assert_close(graph(queries())[0], expected[0], rtol=tolerance, atol=tolerance)
    if not settings.get("storage"):
        same(graph(queries()), expected)


def test_a_graph_shares_the_vectors_and_saves_none():
    index = index_of()
    graph = index.graph()
    assert graph.packed_embeddings.data_ptr() == index.packed_embeddings.data_ptr()
    assert graph.list_ids.data_ptr() == index.list_ids.data_ptr()
    assert not graph.state_dict()
    assert "graph" not in "".join(index.state_dict())


@pytest.mark.parametrize("layout", LAYOUTS)
@each_flat_metric
def test_results_are_ids_that_the_mask_allows(layout, metric):
    index = index_of(metric)
    graph = index.graph(nprobe=9, layout=layout)
    mask = torch.rand(1000, generator=torch.Generator().manual_seed(1)) < 0.02
    D, I = graph(queries(), mask)
    allowed = index.list_ids[(index.list_ids < 1000) & mask[index.list_ids.clamp(max=999)]]
    assert torch.isin(I[I >= 0], allowed).all()
    assert ((I >= 0).sum(1) == min(K, len(allowed))).all()
    flat = IndexFlat(12, metric)
    flat.add_with_ids(index.packed_embeddings[torch.isin(index.list_ids, allowed)], allowed)
    same((D, I), flat.search(queries(), K))
    assert (graph(queries(), torch.zeros(0, dtype=torch.bool))[1] == -1).all()


def test_leading_dimensions_other_floats_and_bad_queries():
    index = index_of()
    graph = index.graph()
    x = queries(24).view(2, 3, 4, D)
    D_, I = graph(x)
    assert D_.shape == I.shape == (2, 3, 4, K)
    same((D_.flatten(0, 2), I.flatten(0, 2)), index.search(queries(24), K))
    assert graph(queries(1)[0])[1].shape == (K,)
    assert torch.equal(graph(queries().double())[1], index.search(queries().double(), K)[1])
    x = queries()
    x[3, 2] = torch.nan
    x[5, 0] = torch.inf
    found = graph(x)
    assert (found[1][[3, 5]] == -1).all()
    assert torch.isinf(found[0][[3, 5]]).all()
    assert torch.equal(found[1][6:], index.search(queries(), K)[1][6:])
    assert graph(queries(0))[1].shape == (0, K)


def test_a_graph_keeps_its_dtypes_and_copies_with_its_model():
    model = Model(index_of().graph()).eval()
    expected = model.index(queries())
    same(model.half().index(queries()), expected)
    same(copy.deepcopy(model).index(queries()), expected)
    same(pickle.loads(pickle.dumps(model.index))(queries()), expected)


def test_empty_and_flat_indexes():
    flat = IndexFlatL2(D, k=3)
    assert (flat.graph()(queries())[1] == -1).all()
    flat.add(queries(40, seed=9))
    for layout in ("rows", "tiles"):
        same(flat.graph(layout=layout)(queries()), flat.search(queries(), 3))


def test_a_graph_raises_if_its_index_has_changed(tmp_path):
    index = IndexFlatL2(D)
    index.add(queries())
    changes = [
        lambda: index.add(queries(1)),
        lambda: index.remove_ids(torch.tensor([0])),
        lambda: index.update(torch.tensor([1]), queries(1)),
        lambda: index.load_state_dict(index.state_dict()),
        lambda: index.reset(),
    ]
    for change in changes:
        graph = index.graph()
        graph(queries())
        change()
        with pytest.raises(RuntimeError, match=r"call index.graph\(...\) again"):
            graph(queries())
    graph = index.graph()
    index.packed_embeddings = index.packed_embeddings.clone()
    for write in (export.to_torchscript, partial(export.to_torchscript, search_mode="csr"), export.to_exported):
        with pytest.raises(RuntimeError, match="again"):
            write(graph, tmp_path / "stale.pt2")
    assert not list(tmp_path.iterdir())
    index.add(queries())
    graph = index.graph()
    index.search(queries(), 2)  # reading does not change the index
    index.state_dict()
    graph(queries())


@pytest.mark.parametrize(
    ("settings", "error", "words"),
    [
        (dict(layout="columns"), ValueError, "layout must be one of 'rows', 'tiles', got 'columns'"),
        (dict(storage=torch.int8), ValueError, "storage must be torch.float32"),
        (dict(k=0), ValueError, "k must be >= 1, got 0"),
        (dict(nprobe=-1), ValueError, "nprobe must be >= 1, got -1"),
    ],
)
def test_wrong_settings_are_refused(settings, error, words):
    with pytest.raises(error, match=words):
        index_of().graph(**settings)


def test_wrong_inputs_are_refused():
    graph = index_of().graph()
    with pytest.raises(ValueError, match=r"x must have shape \(..., 12\), got \(2, 3\)"):
        graph(torch.zeros(2, 3))
    with pytest.raises(TypeError, match="mask must be a bool"):
        graph(queries(), torch.zeros(9))
    with pytest.raises(RuntimeError, match="trained"):
        IndexIVFFlat(4, nlist=2).graph()


def test_autocast_and_inference_mode_do_not_change_answers():
    graph = index_of().graph()
    expected = index_of().search(queries(), K)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        same(graph(queries()), expected)
    with torch.inference_mode():
        same(graph(queries()), expected)
        same(index_of().graph()(queries()), expected)


def test_of_many_centroids_whose_codes_only_kernels_read():
    x = torch.randn(3000, 1024, generator=torch.Generator().manual_seed(0))
    index = IndexIVFFlat(1024, nlist=40, nprobe=3)
    with few_training_rows():
        index.train(x)
    index.add(x)
    for layout in ("rows", "tiles"):
        assert torch.equal(index.graph(k=2, layout=layout)(x[:5])[1][:, 0], torch.arange(5))
    assert torch.equal(torch.compile(index, backend="eager")(x[:5])[1][:, 0], torch.arange(5))
