"""SearchGraph and every format it goes into: the same answers as `search`, by running what was made."""

from __future__ import annotations

import copy
import os
import pickle
import re
import runpy
import subprocess
import sys
import warnings
from functools import cache, partial
from pathlib import Path

import pytest
import torch
from filelock import FileLock  # which torch brings
from torch import nn
from torch._inductor import config as inductor

from torch_ivf_module import IndexFlat, IndexFlatL2, IndexIVFFlat, export, ignore_in_ddp

ROOT = Path(__file__).parent.parent
D, K = 12, 5
BATCHES = (7, 1, 2, 30)


@cache
def index_of(metric: str = "l2", dtype: torch.dtype = torch.float32) -> IndexIVFFlat:
    """Uneven lists, ids of all sizes, an empty list and duplicates."""
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(900, D, generator=generator)
    index = IndexIVFFlat(D, nlist=9, nprobe=3, metric=metric, k=K, dtype=dtype)
    index.train(x[:400])
    index.add(x)
    index.add(x[:300] * 0.01 + x[0])
    index.add_with_ids(x[:50] + 0.5, torch.arange(50) + (1 << 40))
    return index


def queries(n: int = 30, seed: int = 4) -> torch.Tensor:
    return torch.randn(n, D, generator=torch.Generator().manual_seed(seed))


def same(found, expected) -> None:
    agreement = export.compare(tuple(found), tuple(expected))
    assert agreement.good, agreement


GRAPHS = {
    "rows": dict(),
    "tiles": dict(layout="tiles"),
    "half": dict(storage=torch.float16),
    "half tiles": dict(storage=torch.float16, layout="tiles"),
    "all lists": dict(nprobe=9),
    "capped": dict(max_codes=300),
    "k beyond": dict(k=2000, nprobe=9),
}


@pytest.mark.parametrize("metric", ["l2", "ip", "cosine"])
@pytest.mark.parametrize("name", GRAPHS)
def test_a_graph_answers_as_search(name, metric):
    index = index_of(metric)
    settings = GRAPHS[name]
    graph = index.graph(**settings)
    twin = index
    if settings.get("storage") and not settings.get("layout"):  # then it is the copy that is searched
        twin = index_of(metric)
        twin = type(twin)(**{**twin.config(), "dtype": torch.float16})
        twin.load_state_dict(index.state_dict())
    before = twin.nprobe, twin.max_codes
    twin.nprobe, twin.max_codes = graph.nprobe, graph.max_codes
    expected = twin.search(queries(), graph.k)
    twin.nprobe, twin.max_codes = before
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


@pytest.mark.parametrize("layout", ["rows", "tiles"])
@pytest.mark.parametrize("metric", ["l2", "ip"])
def test_a_mask_leaves_only_what_it_marks(layout, metric):
    index = index_of(metric)
    graph = index.graph(nprobe=9, layout=layout)
    mask = torch.rand(1000, generator=torch.Generator().manual_seed(1)) < 0.02
    D, I = graph(queries(), mask)
    held = index.list_ids[(index.list_ids < 1000) & mask[index.list_ids.clamp(max=999)]]
    assert torch.isin(I[I >= 0], held).all()
    assert ((I >= 0).sum(1) == min(K, len(held))).all()
    flat = IndexFlat(12, metric)
    flat.add_with_ids(index.packed_embeddings[torch.isin(index.list_ids, held)], held)
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


def test_a_graph_says_when_its_index_has_changed(tmp_path):
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
    index.search(queries(), 2)  # reading is no change
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
def test_wrong_settings_are_named(settings, error, words):
    with pytest.raises(error, match=words):
        index_of().graph(**settings)


def test_wrong_inputs_are_named():
    graph = index_of().graph()
    with pytest.raises(ValueError, match=r"x must have shape \(..., 12\), got \(2, 3\)"):
        graph(torch.zeros(2, 3))
    with pytest.raises(TypeError, match="mask must be a bool"):
        graph(queries(), torch.zeros(9))
    with pytest.raises(RuntimeError, match="trained"):
        IndexIVFFlat(4, nlist=2).graph()


def alike(found, expected) -> None:
    """Of a model whose head has changed the distances."""
    torch.testing.assert_close(found[0], expected[0], rtol=1e-4, atol=1e-4)
    assert torch.equal(found[1], expected[1])


class Model(nn.Module):
    """An encoder, a graph, a head."""

    def __init__(self, graph: nn.Module) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.encoder, self.index, self.head = nn.Linear(6, D), graph, nn.Linear(K, 2)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        D_, I = self.index(self.encoder(x))
        return self.head(D_), I


# Records and differentiates as the default does, and checks the same before every call, without a C++ compiler.
RECORDS = "aot_eager"
# The compiler uses what PyTorch says is deprecated.
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
    found = model.encoder.weight.grad.clone()
    model.zero_grad()
    model(x)[0].square().sum().backward()
    assert found.abs().max() > 0
    torch.testing.assert_close(found, model.encoder.weight.grad, rtol=1e-4, atol=1e-4)


@compiles
@pytest.mark.parametrize("layout", [pytest.param("rows", marks=pytest.mark.long), "tiles"])
def test_compiled_for_a_batch_of_one(layout):
    """A compilation of its own, here without what a gradient needs."""
    model = Model(index_of().graph(layout=layout))
    with torch.no_grad():
        answers_as_search(compiled(model, dynamic=True), model, torch.randn(1, 6))


@compiles
def test_an_index_compiles_when_it_takes_its_graph():
    index = IndexFlatL2(D, k=K)
    index.add(queries(50, seed=1))
    index.graph()
    same(compiled(index, dynamic=True)(queries()), index.search(queries(), K))
    fast = compiled(index, dynamic=True, backend=RECORDS)
    same(fast(queries()), index.search(queries(), K))
    index.add(queries(50, seed=2))
    with pytest.raises(torch._dynamo.exc.Unsupported, match=r"index\.graph\(\) has been called"):
        fast(queries())
    index.graph()
    same(fast(queries()), index.search(queries(), K))
    index.k = 2
    index.graph(k=1)  # not with the index's own settings
    index.graph()
    same(fast(queries()), index.search(queries(), 2))


@compiles
def test_a_compiled_graph_says_when_its_index_has_changed():
    index = IndexFlatL2(D)
    index.add(queries(50, seed=1))
    fast = compiled(index.graph(k=1), backend=RECORDS)
    fast(queries())
    index.add(queries(1))
    with pytest.raises((RuntimeError, torch._dynamo.exc.Unsupported)):
        fast(queries())


# -- files ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """Write each format once, whichever worker asks first: name -> path."""
    folder = tmp_path_factory.getbasetemp()
    folder = (folder.parent if "PYTEST_XDIST_WORKER" in os.environ else folder) / "exported"
    folder.mkdir(exist_ok=True)

    def write(format: str, graph: str = "rows", mask: int | None = None, metric: str = "l2") -> Path:
        pytest.importorskip("onnxscript" if format == "onnx" else "torch")
        name = "-".join(str(part) for part in (format, graph, mask, metric)).replace(" ", "-")
        suffix = {"torchscript": "pt", "onnx": "onnx"}.get(format, "pt2")
        path = folder / f"{name}.{suffix}"
        settings = {} if format == "torchscript" else dict(mask=mask)
        # Compiling the headers beforehand pays from the third model on.
        with FileLock(f"{path}.lock"), inductor.patch({"aot_inductor.precompile_headers": False}):
            if not path.exists():
                export.FORMATS[format](index_of(metric).graph(**GRAPHS[graph]), path, **settings)
        return path

    return write


@pytest.mark.filterwarnings("ignore")  # of the exporters, about themselves
@pytest.mark.parametrize(
    ("format", "metric", "graph"),
    [
        *((format, "l2", "tiles") for format in ("eager", *export.FORMATS)),
        *(
            (format, metric, "rows")
            for format in ("eager", *export.FORMATS)
            for metric in ("l2", "cosine")
            if format != "aoti"
        ),
        # What a C++ compiler is given differs by a normalisation alone, and torch.compile gives it the rows of l2.
        pytest.param("aoti", "l2", "rows", marks=pytest.mark.long),
    ],
)
def test_every_format_answers_as_search(written, format, metric, graph):
    if format == "eager":
        run = index_of(metric).graph(**GRAPHS[graph])
    else:
        run = export.runner(written(format, graph, metric=metric), format)
    for n in BATCHES:
        same(run(queries(n)), index_of(metric).search(queries(n), K))


@pytest.mark.parametrize("search_mode", ["matrix", "csr"])
def test_torchscript_says_nothing_that_its_user_cannot_change(search_mode, tmp_path):
    index = IndexFlatL2(D)
    index.add(queries(50, seed=1))
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        path = export.to_torchscript(index.graph(k=1), tmp_path / "search.pt", search_mode=search_mode)
        export.runner(path, "torchscript")(queries())
    assert said == []


def test_a_program_that_scripts_a_graph_hears_of_its_own_call_alone():
    index = IndexFlatL2(D)
    index.add(queries(50, seed=1))
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        torch.jit.script(nn.Sequential(index.graph(k=1)))
    assert [str(each.message).split("`")[1] for each in said] == ["torch.jit.script"]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("format", ["torchscript", "exported", "onnx"])
def test_masks_in_files(written, format):
    mask = torch.rand(1000, generator=torch.Generator().manual_seed(1)) < 0.1
    masked = None if format == "torchscript" else 1000
    run = export.runner(written(format, "rows", masked), format)
    same(run(queries(), mask), index_of().graph()(queries(), mask))


ALONE = """
import sys, torch
answers, *paths = sys.argv[1:]
held = torch.load(answers)
openers = torch.jit.load, lambda path: torch.export.load(path).module(), torch._inductor.aoti_load_package
for path, opener in zip(paths, openers, strict=True):
    D, I = opener(path)(held["x"])
    assert torch.equal(I, held["I"]), path
    torch.testing.assert_close(D, held["D"])
assert not [name for name in sys.modules if name.startswith("torch_ivf_module")]
"""


@pytest.mark.filterwarnings("ignore")
def test_files_run_in_a_process_without_the_package(written, tmp_path):
    x = queries(9)
    found, ids = index_of().search(x, K)
    torch.save({"x": x, "D": found, "I": ids}, tmp_path / "answers.pt")
    files = [str(written(format, "tiles")) for format in ("torchscript", "exported", "aoti")]
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", ALONE, str(tmp_path / "answers.pt"), *files],
        capture_output=True,
        text=True,
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr


def test_torchscript_of_a_users_model(tmp_path):
    model = Model(index_of().graph()).eval()
    x = torch.randn(4, 5, 6)
    run = export.runner(export.to_torchscript(model, tmp_path / "model.pt"), "torchscript")
    alike(run(x), model(x))
    assert type(model.index).__name__ == "SearchGraph"  # scripting leaves the model as it was
    y = x.clone().requires_grad_()
    run(y)[0].sum().backward()
    z = x.clone().requires_grad_()
    model(z)[0].sum().backward()
    torch.testing.assert_close(y.grad, z.grad, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("metric", ["l2", "ip", "cosine"])
def test_scripted_loop_over_lists(metric, tmp_path):
    path = export.to_torchscript(index_of(metric).graph(), tmp_path / "lists.pt", search_mode="csr")
    run = export.runner(path, "torchscript")
    for n in (1, 30, 600, 0):
        same(run(queries(n)), index_of(metric).search(queries(n), K))
    assert (run(torch.full((2, D), torch.nan))[1] == -1).all()
    with torch.no_grad():
        path = export.to_torchscript(index_of(metric).graph(), tmp_path / "lists.pt", search_mode="csr")
    x = queries().requires_grad_()
    found = export.runner(path, "torchscript")(x)[0]
    y = queries().requires_grad_()
    index_of(metric).search(y, K)[0].sum().backward()
    found.sum().backward()
    torch.testing.assert_close(x.grad, y.grad, rtol=1e-4, atol=1e-4)


def test_scripted_loop_cuts_batches_by_bytes(tmp_path):
    index = IndexFlatL2(D, k=K, max_bytes=1 << 16)
    index.add(queries(5000, seed=8))  # more than a section
    path = export.to_torchscript(index.graph(), tmp_path / "lists.pt", search_mode="csr")
    same(export.runner(path, "torchscript")(queries(100)), index.search(queries(100), K))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.long
def test_onnx_with_half_vectors_in_one_file_and_in_two(tmp_path):
    pytest.importorskip("onnxscript")
    graph = index_of().graph(storage=torch.float16)
    one = export.to_onnx(graph, tmp_path / "one.onnx")
    two = export.to_onnx(graph, tmp_path / "two.onnx", most_bytes=1000)
    two = export.to_onnx(graph, tmp_path / "two.onnx", most_bytes=1000)  # leaves no weights of the file before
    names = sorted(file.name for file in tmp_path.iterdir())
    assert [re.sub("[0-9a-f]{8}", "#", name) for name in names] == ["one.onnx", "two.onnx", "two.onnx.#.data"]
    assert two.stat().st_size < one.stat().st_size
    three = export.to_onnx(graph, tmp_path / ("3" * 250 + ".onnx"), most_bytes=1000)
    for path in (one, two, three):
        same(export.runner(path, "onnx")(queries()), graph(queries()))


@pytest.mark.filterwarnings("ignore")
def test_users_models_in_files(tmp_path):
    pytest.importorskip("onnxscript")
    model = Model(index_of().graph()).eval()
    x = torch.randn(6, 6)
    for format, suffix in (("exported", "pt2"), ("onnx", "onnx")):
        path = export.FORMATS[format](model, tmp_path / f"model.{suffix}", example=x)
        alike(export.runner(path, format)(x[:3]), model(x[:3]))
    model.train()
    export.to_exported(model, tmp_path / "model.pt2", example=x)
    export.to_torchscript(model, tmp_path / "model.pt")
    assert all(module.training for module in model.modules())
    with pytest.raises(ValueError, match=r"path must end in .pt2"):
        export.to_aoti(model, tmp_path / "model.so", example=x)
    with pytest.raises(ValueError, match="example is needed to export a Model"):
        export.to_exported(model, tmp_path / "none.pt2")
    with pytest.raises(ValueError, match="example must have at least two rows"):
        export.to_exported(model, tmp_path / "none.pt2", example=x[:1])
    model.graph = nn.Linear(1, 1)
    with pytest.raises(ValueError, match="called 'graph'"):
        export.to_exported(model, tmp_path / "none.pt2", example=x)
    with pytest.raises(ValueError, match="format must be one of"):
        export.runner(path, "pickle")
    assert not (tmp_path / "none.pt2").exists()


def test_export_script(tmp_path, monkeypatch, capsys):
    index_of().save(tmp_path / "index.pt")
    script = [str(ROOT / "export" / "export_index.py"), str(tmp_path / "index.pt"), "--format", "torchscript"]
    done = subprocess.run(
        [sys.executable, *script, "--k", "3", "--nprobe", "2", "--out", str(tmp_path / "out.pt"), "--check"],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert done.returncode == 0, done.stderr
    assert "batch 33: 100.00% of the ids agree" in done.stdout
    monkeypatch.setattr(sys, "argv", [*script, "--out", str(tmp_path / "index.pt")])
    with pytest.raises(SystemExit) as refused:
        runpy.run_path(script[0], run_name="__main__")
    assert refused.value.code == 1
    assert "would overwrite" in capsys.readouterr().err


# -- contexts ------------------------------------------------------------------------------------------------------


def test_autocast_and_inference_mode_change_nothing():
    graph = index_of().graph()
    expected = index_of().search(queries(), K)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        same(graph(queries()), expected)
    with torch.inference_mode():
        same(graph(queries()), expected)
        same(index_of().graph()(queries()), expected)


def test_ddp_is_told_to_leave_vectors_alone():
    model = nn.Sequential(nn.Linear(D, D), nn.BatchNorm1d(D), index_of())
    model._ddp_params_and_buffers_to_ignore = ["0.weight"]
    names = ignore_in_ddp(model)
    assert names == [f"2.{name}" for name, _ in model[2].named_buffers()]
    assert model._ddp_params_and_buffers_to_ignore == ["0.weight", *names]
    model = Model(index_of().graph())
    assert "index.packed_embeddings" in ignore_in_ddp(model)


def test_ddp_broadcasts_no_vectors(tmp_path):
    model = Model(index_of().graph())
    ignore_in_ddp(model)
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        wrapped = nn.parallel.DistributedDataParallel(model)
        x = torch.randn(4, 6)
        wrapped(x)[0].sum().backward()
        assert not wrapped.modules_buffers
        alike(wrapped(x), model(x))
    finally:
        torch.distributed.destroy_process_group()
