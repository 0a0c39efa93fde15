"""Every export format: files answer as `search` does, with and without this package installed."""

from __future__ import annotations

import os
import re
import runpy
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from filelock import FileLock  # a dependency of torch
from torch import nn
from torch._inductor import config as inductor

from tests.graphs import GRAPHS, D, K, Model, alike, index_of, queries, same
from tests.problems import each_metric
from torch_ivf_module import IndexFlatL2, export

ROOT = Path(__file__).parent.parent
BATCHES = (7, 1, 2, 30)


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """A function that writes a file of the given format, or returns the one that any test process has written."""
    folder = tmp_path_factory.getbasetemp()
    folder = (folder.parent if "PYTEST_XDIST_WORKER" in os.environ else folder) / "exported"
    folder.mkdir(exist_ok=True)

    def write(format: str, graph: str = "rows", mask: int | None = None, metric: str = "l2") -> Path:
        pytest.importorskip("onnxscript" if format == "onnx" else "torch")
        name = "-".join(map(str, (format, graph, mask, metric))).replace(" ", "-")
        suffix = {"torchscript": "pt", "onnx": "onnx"}.get(format, "pt2")
        path = folder / f"{name}.{suffix}"
        settings = {} if format == "torchscript" else dict(mask=mask)
        # Precompiled headers save time from the third model on only. The wrapper of the kernels need not be optimized.
        faster = {"aot_inductor.precompile_headers": False, "aot_inductor.compile_wrapper_opt_level": "O0"}
        with FileLock(f"{path}.lock"), inductor.patch(faster):
            if not path.exists():
                export.FORMATS[format](index_of(metric).graph(**GRAPHS[graph]), path, **settings)
        return path

    return write


@pytest.mark.filterwarnings("ignore")  # of the exporters
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
        # test_graph_compile.py compiles the same operations with torch.compile.
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
def test_torchscript_export_gives_no_warnings(search_mode, tmp_path):
    index = IndexFlatL2(D)
    index.add(queries(50, seed=1))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        path = export.to_torchscript(index.graph(k=1), tmp_path / "search.pt", search_mode=search_mode)
        export.runner(path, "torchscript")(queries())
    assert caught == []


def test_scripting_a_graph_warns_only_of_the_callers_use_of_torchscript():
    index = IndexFlatL2(D)
    index.add(queries(50, seed=1))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.jit.script(nn.Sequential(index.graph(k=1)))
    assert [str(warning.message).split("`")[1] for warning in caught] == ["torch.jit.script"]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("format", ["torchscript", "exported", "onnx"])
def test_exported_files_take_a_mask(written, format):
    mask = torch.rand(1000, generator=torch.Generator().manual_seed(1)) < 0.1
    size = None if format == "torchscript" else 1000
    run = export.runner(written(format, "rows", size), format)
    same(run(queries(), mask), index_of().graph()(queries(), mask))


WITHOUT_PACKAGE = """
import sys, torch
answers, *paths = sys.argv[1:]
expected = torch.load(answers)
openers = torch.jit.load, lambda path: torch.export.load(path).module(), torch._inductor.aoti_load_package
for path, opener in zip(paths, openers, strict=True):
    D, I = opener(path)(expected["x"])
    assert torch.equal(I, expected["I"]), path
    torch.testing.assert_close(D, expected["D"])
assert not [name for name in sys.modules if name.startswith("torch_ivf_module")]
"""


@pytest.mark.filterwarnings("ignore")
def test_files_run_in_a_process_without_the_package(written, tmp_path):
    x = queries(9)
    distances, ids = index_of().search(x, K)
    torch.save({"x": x, "D": distances, "I": ids}, tmp_path / "answers.pt")
    files = [str(written(format, "tiles")) for format in ("torchscript", "exported", "aoti")]
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", WITHOUT_PACKAGE, str(tmp_path / "answers.pt"), *files],
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
    assert type(model.index).__name__ == "SearchGraph"  # scripting does not change the model
    y = x.clone().requires_grad_()
    run(y)[0].sum().backward()
    z = x.clone().requires_grad_()
    model(z)[0].sum().backward()
    torch.testing.assert_close(y.grad, z.grad, rtol=1e-4, atol=1e-5)


@each_metric
def test_scripted_list_major_search(metric, tmp_path):
    path = export.to_torchscript(index_of(metric).graph(), tmp_path / "lists.pt", search_mode="csr")
    run = export.runner(path, "torchscript")
    for n in (1, 30, 600, 0):
        same(run(queries(n)), index_of(metric).search(queries(n), K))
    assert (run(torch.full((2, D), torch.nan))[1] == -1).all()
    with torch.no_grad():
        path = export.to_torchscript(index_of(metric).graph(), tmp_path / "lists.pt", search_mode="csr")
    x = queries().requires_grad_()
    distances = export.runner(path, "torchscript")(x)[0]
    y = queries().requires_grad_()
    index_of(metric).search(y, K)[0].sum().backward()
    distances.sum().backward()
    torch.testing.assert_close(x.grad, y.grad, rtol=1e-4, atol=1e-4)


def test_scripted_list_major_search_in_small_batches(tmp_path):
    index = IndexFlatL2(D, k=K, max_bytes=1 << 16)
    index.add(queries(5000, seed=8))  # more than one section of functional/block_maxima.py
    path = export.to_torchscript(index.graph(), tmp_path / "lists.pt", search_mode="csr")
    same(export.runner(path, "torchscript")(queries(100)), index.search(queries(100), K))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.long
def test_onnx_with_half_vectors_in_one_file_and_in_two(tmp_path):
    pytest.importorskip("onnxscript")
    graph = index_of().graph(storage=torch.float16)
    one = export.to_onnx(graph, tmp_path / "one.onnx")
    two = export.to_onnx(graph, tmp_path / "two.onnx", most_bytes=1000)
    two = export.to_onnx(graph, tmp_path / "two.onnx", most_bytes=1000)  # deletes the data of the previous file
    names = sorted(file.name for file in tmp_path.iterdir())
    assert [re.sub("[0-9a-f]{8}", "#", name) for name in names] == ["one.onnx", "two.onnx", "two.onnx.#.data"]
    assert two.stat().st_size < one.stat().st_size
    three = export.to_onnx(graph, tmp_path / ("3" * 250 + ".onnx"), most_bytes=1000)
    for path in (one, two, three):
        same(export.runner(path, "onnx")(queries()), graph(queries()))


@pytest.mark.filterwarnings("ignore")
def test_export_of_a_users_model(tmp_path):
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
    with pytest.raises(ValueError, match="example is needed to export Model"):
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
    with pytest.raises(SystemExit) as caught:
        runpy.run_path(script[0], run_name="__main__")
    assert caught.value.code == 1
    assert "would overwrite" in capsys.readouterr().err
