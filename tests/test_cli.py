"""The commands of the command line, over every file format."""

from __future__ import annotations

import json
import os
import re
import runpy
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.datasets import normal
from tests.oracle import agree
from tests.problems import each_metric
from tests.states import same_state
from tests.vector_files import ROWS, WRITERS, D, hdf5
from torch_ivf_module import IndexFlatL2, IndexIVFFlat, IndexPreTransform, export, load
from torch_ivf_module.advice import nlist_for, nlist_range
from torch_ivf_module.cli import main
from torch_ivf_module.commands import info


@pytest.fixture(scope="module")
def x():
    return normal(ROWS, D)


def run(*words) -> int:
    return main([str(word) for word in words])


def facts_of(capsys, *words):
    """The JSON object that a command prints with --json, which must be its whole output."""
    assert run(*words, "--json") == 0
    return json.loads(capsys.readouterr().out)


@pytest.fixture(params=WRITERS)
def file(request, tmp_path, x):
    WRITERS[request.param](tmp_path / request.param, x)
    return tmp_path / request.param


@pytest.fixture
def index(x, tmp_path):
    index = IndexIVFFlat(D, nlist=8, nprobe=3)
    index.train(x).add(x)
    index.save(tmp_path / "index.pt")
    return index


# --- build --------------------------------------------------------------------------------------------------


def test_build_writes_the_index_that_python_would_build(file, x, tmp_path, capsys):
    out = tmp_path / "index.pt"
    facts = facts_of(capsys, "build", file, out, "--nlist", 8, "--nprobe", 8, "--batch", 200)
    index = load(out)
    assert (facts["ntotal"], facts["nlist"]) == (ROWS, 8)
    assert (index.nprobe, index.metric, index.ntotal) == (8, "l2", ROWS)
    flat = IndexFlatL2(D)
    flat.add(x)
    agree(index.search(x[:30], 5), flat.search(x[:30], 5), rtol=1e-4, atol=1e-4)


@each_metric
def test_build_flat_with_ids_and_dtype(metric, x, tmp_path, capsys):
    np.save(tmp_path / "x.npy", x.numpy())
    np.save(tmp_path / "ids.npy", np.arange(ROWS) * 5)
    out = tmp_path / "index.safetensors"
    words = ("--flat", "--metric", metric, "--ids-from", tmp_path / "ids.npy", "--dtype", "float16", "--rows", 300)
    facts = facts_of(capsys, "build", tmp_path / "x.npy", out, *words)
    index = load(out)
    assert (index.metric, index.dtype, index.ntotal) == (metric, torch.float16, 300)
    assert (index.list_ids == torch.arange(300) * 5).all()
    assert facts["bytes"] == out.stat().st_size


def test_bars_are_drawn_on_a_terminal_only(x, tmp_path, capsys, monkeypatch):
    np.save(tmp_path / "x.npy", x.numpy())
    words = ("build", tmp_path / "x.npy", tmp_path / "index.pt", "--nlist", 8, "--batch", 200)
    assert run(*words) == 0
    assert not re.search(r"[%\r]", capsys.readouterr().err)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    assert run(*words) == 0
    drawn = capsys.readouterr().err
    assert all(f"{title}:" in drawn for title in ("sample", "k-means", "assign", "write"))


def test_all_rows_of_a_file_larger_than_memory_are_added(x, tmp_path, capsys):
    np.save(tmp_path / "x.npy", x.numpy())
    words = ("build", tmp_path / "x.npy", tmp_path / "index.pt", "--nlist", 8)
    assert run(*words, "--max-memory", "4K") == 1
    assert "bytes for 8 lists of 12 numbers, got 4,096" in capsys.readouterr().err
    assert run(*words, "--max-memory", "50K") == 0
    small = load(tmp_path / "index.pt").state_dict()
    assert run(*words) == 0
    assert same_state(small, load(tmp_path / "index.pt").state_dict())


@pytest.mark.filterwarnings("default")
def test_the_training_sample_is_smaller_where_memory_is(tmp_path, capsys):
    np.save(tmp_path / "x.npy", normal(4_000, 64).numpy())
    words = ("build", tmp_path / "x.npy", tmp_path / "index.pt", "--dtype", "float16", "--max-memory", "300K")
    assert run(*words, "--nlist", 80) == 0
    printed = capsys.readouterr()
    trained = int(re.search(r"80 lists on ([\d,]+) rows", printed.out)[1].replace(",", ""))
    assert load(tmp_path / "index.pt").ntotal == 4_000
    assert 80 < trained < 39 * 80
    assert f"allows training on {trained:,} rows of 4,000, which is few for 80 lists" in printed.err
    assert run(*words, "--nlist", 3_900) == 1
    assert "max_memory must be more than" in capsys.readouterr().err


def _growth(*words):
    """Bytes by which the memory of a process that runs a command grows, without mapped files."""
    code = "import sys, tqdm; from torch_ivf_module.cli import main; print(), input(); main(sys.argv[1:])"
    command = [sys.executable, "-u", "-c", code, *map(str, words)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
    with subprocess.Popen(command, **pipes, env={**os.environ, "OMP_NUM_THREADS": "1"}) as program:

        def held():
            found = re.search(r"RssAnon:\s+(\d+)", Path(f"/proc/{program.pid}/status").read_text())
            return 1024 * int(found[1]) if found else 0

        program.stdout.readline()
        before = most = held()
        program.stdin.write(b"\n")
        program.stdin.close()
        while program.poll() is None:
            most = max(most, held())
            time.sleep(0.002)
    return most - before


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory is read from /proc")
def test_build_stays_within_max_memory(tmp_path):
    # In memory it takes three times as much as the file has.
    np.save(tmp_path / "x.npy", normal(260_000, 128).numpy())  # 127 MiB
    allowed = 64 << 20
    words = ("build", tmp_path / "x.npy", tmp_path / "index.pt", "--nlist", 512, "--niter", 1)
    grown = _growth(*words, "--max-memory", allowed)
    assert load(tmp_path / "index.pt", mmap=True).ntotal == 260_000
    assert grown < allowed


def test_a_bad_row_is_named_with_its_batch_and_no_file_is_written(x, tmp_path, capsys):
    bad = x.clone()
    bad[613, 2] = torch.nan
    np.save(tmp_path / "x.npy", bad.numpy())
    assert run("build", tmp_path / "x.npy", tmp_path / "index.pt", "--flat", "--batch", 100) == 1
    printed = capsys.readouterr().err
    assert "rows 600 to 699" in printed
    assert "row 13 holds" in printed
    assert not (tmp_path / "index.pt").exists()


def test_a_bad_row_of_the_sample_is_named_by_its_row_in_the_file(x, tmp_path, capsys):
    bad = x.double()
    bad[613, 2] = 1e300
    np.save(tmp_path / "x.npy", bad.numpy())
    assert run("build", tmp_path / "x.npy", tmp_path / "index.pt", "--nlist", 8, "--batch", 100) == 1
    assert f"{tmp_path / 'x.npy'} cannot be trained on: row 613" in capsys.readouterr().err


def test_wrong_arguments_are_refused_before_the_build(x, tmp_path, capsys):
    np.save(tmp_path / "x.npy", x.numpy())
    np.save(tmp_path / "ids.npy", np.arange(3))
    for words, says in {
        (tmp_path / "x.npy", tmp_path / "nowhere" / "index.pt"): "no such folder",
        (tmp_path / "none.npy", tmp_path / "index.pt"): "no such file",
        (tmp_path / "x.npy", tmp_path / "index.pt", "--ids", tmp_path / "ids.npy"): "one id for each",
        (tmp_path / "x.npy", tmp_path / "index.pt", "--nlist", 10_000): "10,000 lists",
        (tmp_path / "x.npy", tmp_path / "x.npy"): "would overwrite",
        (tmp_path / "x.npy", tmp_path): "is a folder",
        (tmp_path / "x.npy", tmp_path / "index.npy"): "must end in .pt",
        (tmp_path / "x.npy", tmp_path / "index.pt", "--flat", "--nlist", 3, "--nprobe", 2): "leave out --nlist, --npro",
    }.items():
        assert run("build", *words) == 1
        assert says in capsys.readouterr().err


def test_no_command_overwrites_its_input(index, x, tmp_path, capsys, monkeypatch):
    torch.save(x, tmp_path / "x.pt")
    np.save(tmp_path / "x.npy", x.numpy())
    (tmp_path / "link.pt").symlink_to(tmp_path / "x.pt")
    monkeypatch.chdir(tmp_path)
    search = ("search", "index.pt", "x.npy")
    for words in (
        ("build", "x.pt", tmp_path / "x.pt"), ("build", "link.pt", "x.pt"),
        ("convert", "index.pt", f"../{tmp_path.name}/index.pt"),
        ("export", "index.pt", "--format", "exported", "--out", "index.pt"),
        (*search, "--ids", "x.npy"), (*search, "--ids", "s.npy", "--distances", "./s.npy"),
    ):  # fmt: skip
        assert run(*words) == 1
        assert "would overwrite" in capsys.readouterr().err
    for words in ((*search, "--ids", "nowhere/i.npy"), ("convert", "index.pt", "nowhere/c.pt")):
        assert run(*words) == 1
        assert "no such folder: nowhere" in capsys.readouterr().err
    assert torch.equal(torch.load("x.pt"), x)
    assert not Path("s.npy").exists()


def test_the_suffix_decides_the_format(x, faiss, tmp_path, capsys):
    np.save(tmp_path / "x.npy", x.numpy())
    for name in ("index.pth", "INDEX.SAFETENSORS", "index.Faiss"):
        assert facts_of(capsys, "build", tmp_path / "x.npy", tmp_path / name, "--nlist", 8)["ntotal"] == ROWS
        assert load(tmp_path / name).ntotal == ROWS
        assert (
            run("convert", tmp_path / name, tmp_path / "c.npy") == run("convert", tmp_path / name, tmp_path / "c") == 1
        )
        assert ".faissindex or .index" in capsys.readouterr().err
    assert faiss.read_index(str(tmp_path / "index.Faiss")).ntotal == ROWS


def test_the_metric_is_read_from_the_file(x, tmp_path, capsys):
    for distance, metric in {"euclidean": "l2", "angular": "cosine", "dot": "ip"}.items():
        hdf5(tmp_path / "x.hdf5", x, distance)
        assert facts_of(capsys, "build", tmp_path / "x.hdf5", tmp_path / "index.pt", "--nlist", 8)["metric"] == metric
        assert "recall" in facts_of(capsys, "search", tmp_path / "index.pt", tmp_path / "x.hdf5")
    words = ("build", tmp_path / "x.hdf5", tmp_path / "index.pt", "--nlist", 8, "--metric", "l2")
    assert facts_of(capsys, *words)["metric"] == "l2"
    assert run("search", tmp_path / "index.pt", tmp_path / "x.hdf5", "--json") == 0
    printed = capsys.readouterr()
    assert "recall" not in json.loads(printed.out)
    assert "are by 'ip', the index is by 'l2'" in printed.err
    hdf5(tmp_path / "x.hdf5", x, np.bytes_(b"hamming"))
    assert run(*words[:5]) == 1
    assert "'hamming'" in capsys.readouterr().err


@pytest.mark.filterwarnings("default")
def test_few_training_rows_give_one_line_of_warning(x, tmp_path, capsys):
    np.save(tmp_path / "x.npy", x.numpy())
    assert run("build", tmp_path / "x.npy", tmp_path / "index.pt", "--nlist", 64) == 0
    lines = [line for line in capsys.readouterr().err.splitlines() if "warning" in line]
    assert lines == ["warning: 900 training rows for 64 centroids: give at least 2496 for good lists"]


# --- search -------------------------------------------------------------------------------------------------


def test_search_arguments_that_do_not_fit_the_index_are_refused(index, x, tmp_path, capsys):
    flat = IndexFlatL2(D)
    flat.add(x)
    flat.save(tmp_path / "flat.pt")
    np.save(tmp_path / "x.npy", x.numpy())
    np.save(tmp_path / "thin.npy", x[:, :5].numpy())
    for words, says in {
        ("flat.pt", "x.npy", "--nprobe", 3): "flat index, which has no lists: leave out --nprobe",
        ("index.pt", "thin.npy"): "vectors of 5",
    }.items():
        assert run("search", tmp_path / words[0], tmp_path / words[1], *words[2:]) == 1
        assert says in capsys.readouterr().err


def test_search_writes_arrays(index, file, x, tmp_path, capsys):
    words = ("--ids", tmp_path / "I.npy", "--distances", tmp_path / "D.npy", "-k", 4, "--batch", 37, "--mmap")
    facts = facts_of(capsys, "search", tmp_path / "index.pt", file, *words)
    queries = x[:20] if file.suffix == ".hdf5" else x
    found = torch.from_numpy(np.load(tmp_path / "D.npy")), torch.from_numpy(np.load(tmp_path / "I.npy"))
    agree(found, index.search(queries, 4), rtol=1e-5, atol=1e-5)
    assert facts["queries"] == len(queries)
    assert ("recall" in facts) == (file.suffix == ".hdf5")


def test_search_prints_the_first_results(index, x, tmp_path, capsys):
    np.save(tmp_path / "q.npy", x[:30].numpy())
    assert run("search", tmp_path / "index.pt", tmp_path / "q.npy", "-k", 3, "--nprobe", 8) == 0
    out = capsys.readouterr().out
    assert "0 (0)" in out
    assert "9 (0)" in out
    assert "the first 10 of 30 queries" in out
    facts = facts_of(capsys, "search", tmp_path / "index.pt", tmp_path / "q.npy", "-k", 1000, "--nprobe", 1)
    assert facts["results"][7]["ids"][0] == 7
    assert facts["results"][7]["distances"][-1] is None
    assert facts["results"][7]["ids"][-1] == -1


def test_recall_against_the_neighbours_in_the_file(index, x, tmp_path, capsys):
    hdf5(tmp_path / "x.hdf5", x)
    assert facts_of(capsys, "search", tmp_path / "index.pt", tmp_path / "x.hdf5", "--nprobe", 8)["recall"] == 1
    assert 0.3 < facts_of(capsys, "search", tmp_path / "index.pt", tmp_path / "x.hdf5", "--nprobe", 1)["recall"] < 1


def test_searching_an_untrained_index_is_refused(x, tmp_path, capsys):
    np.save(tmp_path / "x.npy", x.numpy())
    IndexIVFFlat(D, nlist=8).save(tmp_path / "index.pt")
    assert run("search", tmp_path / "index.pt", tmp_path / "x.npy") == 1
    assert "not trained" in capsys.readouterr().err
    assert run("search", tmp_path / "x.npy", tmp_path / "x.npy") == 1
    assert "x.npy" in capsys.readouterr().err


# --- info, convert, export ----------------------------------------------------------------------------------


def test_info_reports_sizes_and_list_lengths(index, tmp_path, capsys):
    facts = facts_of(capsys, "info", tmp_path / "index.pt")
    sizes = index.list_offsets.diff()
    assert (facts["ntotal"], facts["nlist"], facts["dtype"]) == (ROWS, 8, "float32")
    assert facts["bytes"]["packed_embeddings"] == 4 * D * ROWS
    assert sum(part["lists"] for part in facts["lists"]["histogram"]) == 8
    for part in facts["lists"]["histogram"]:
        assert part["lists"] == int(((sizes >= part["from"]) & (sizes <= part["to"])).sum())
    assert facts["lists"]["imbalance"] == pytest.approx(8 * float((sizes / ROWS).square().sum()))


def test_imbalance_factor_as_faiss(index, faiss, tmp_path, capsys):
    from torch_ivf_module import to_faiss

    facts = facts_of(capsys, "info", tmp_path / "index.pt")
    assert facts["lists"]["imbalance"] == pytest.approx(to_faiss(index).invlists.imbalance_factor())


def test_info_of_every_kind_of_index(index, x, tmp_path, capsys):
    behind = IndexPreTransform(D, torch.nn.Linear(D, 3), IndexFlatL2(3))
    behind.add(x)
    for made in (index, IndexIVFFlat(D, nlist=8), IndexFlatL2(D), behind):
        made.save(tmp_path / "one.pt")
        assert run("info", tmp_path / "one.pt") == 0
        out = capsys.readouterr().out
        assert type(made).__name__ in out
        assert max(map(len, out.splitlines())) < 180
    assert "Linear" in out


def test_advice():
    assert nlist_for(1) == 1
    assert nlist_for(10**6) == 4000
    fewest, most = nlist_range(10**6)
    assert fewest < nlist_for(10**6) < most
    assert nlist_range(0) == (1, 1)


def test_convert_to_faiss_and_back(index, faiss, x, tmp_path, capsys):
    assert facts_of(capsys, "convert", tmp_path / "index.pt", tmp_path / "there.faiss")["ntotal"] == ROWS
    assert faiss.read_index(str(tmp_path / "there.faiss")).ntotal == ROWS
    assert run("convert", tmp_path / "there.faiss", tmp_path / "back.safetensors") == 0
    agree(load(tmp_path / "back.safetensors").search(x[:9], 5), index.search(x[:9], 5), rtol=1e-5, atol=1e-5)
    assert run("convert", tmp_path / "index.pt", tmp_path / "half.pt", "--dtype", "float16") == 0
    assert load(tmp_path / "half.pt").dtype == torch.float16
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_export_and_check(index, tmp_path, capsys):
    facts = facts_of(capsys, "export", tmp_path / "index.pt", "--format", "torchscript", "--check")
    assert [check["ok"] for check in facts["check"]] == [True] * 3
    assert export.runner(facts["files"][0], "torchscript")(torch.zeros(2, D))[1].shape == (2, 10)


# --- the program --------------------------------------------------------------------------------------------


def test_as_a_program(index, x, tmp_path, monkeypatch, capsys):
    command = [sys.executable, "-m", "torch_ivf_module", "info"]
    done = subprocess.run([*command, str(tmp_path / "index.pt")], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert "imbalance factor" in done.stdout
    monkeypatch.setattr(sys, "argv", [*command[2:], str(tmp_path / "none.pt")])
    with pytest.raises(SystemExit) as ended:
        runpy.run_module("torch_ivf_module", run_name="__main__")
    assert ended.value.code == 1
    assert capsys.readouterr().err == f"error: no such file: {tmp_path / 'none.pt'}\n"


def test_an_interruption_prints_one_word(index, tmp_path, capsys, monkeypatch):
    def interrupted(*args, **settings):
        raise KeyboardInterrupt

    monkeypatch.setattr(info, "load", interrupted)
    assert run("info", tmp_path / "index.pt") == 130
    assert capsys.readouterr() == ("", "interrupted\n")
