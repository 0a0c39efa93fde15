"""The benchmarks end to end on a tiny case, and the arithmetic of their tables. No time is asserted."""

from __future__ import annotations

import io
import json
import subprocess
import sys
import warnings
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, redirect_stderr, redirect_stdout
from pathlib import Path
from typing import NamedTuple
from unittest.mock import patch

import numpy as np
import pytest
import torch

from benchmarks import answers, engines, machine, results
from benchmarks.__main__ import COMMANDS, main
from benchmarks.blocks import MARKED, fill
from benchmarks.cases import CASES, PLAN
from benchmarks.commands import peers
from benchmarks.commands.report import stored as figures
from benchmarks.commands.score_auto import Cell, score
from benchmarks.measure import Effort
from benchmarks.results import latest
from benchmarks.tables import TABLES, TO_FAISS, Figure, Table, pivot
from benchmarks.tasks import TASKS
from benchmarks.tasks.profile import operators
from benchmarks.tasks.serving import busy_processes, serve

ROOT = Path(__file__).resolve().parents[1]
TRIED = ("lists", "search", "add", "pairs", "quantizers", "auto", "budgets", "codes", "filters")
TRIED += ("maintenance", "serving")
_NONE = dict.fromkeys(("turn_seconds", "serve_seconds", "pause_seconds"), 0)
SWIFT = Effort(rounds=2, fewest_rounds=1, most_calls=1, call_seconds=float("inf"), **_NONE)
README = "before\n<!-- fast:begin -->\nold figures\n<!-- fast:end -->\nafter\n"
READMES = ("README.md", "README.ja.md")


class Said(NamedTuple):
    returncode: int
    stdout: str
    stderr: str


def _benchmarks(*arguments: str | Path | int) -> Said:
    """One command, in this process, where it must not set thread counts for good; its figures are worth nothing."""
    out, err = io.StringIO(), io.StringIO()
    with ExitStack() as stack:
        stack.enter_context(redirect_stdout(out))
        stack.enter_context(redirect_stderr(err))
        stack.enter_context(warnings.catch_warnings())
        warnings.simplefilter("ignore")
        stack.enter_context(patch.object(machine, "set_threads"))
        stack.enter_context(patch.object(engines, "build_kernel", lambda: False))
        stack.enter_context(patch("benchmarks.measure.QUICK", SWIFT))
        stack.enter_context(patch("gc.collect"))  # half the time of a small run
        try:
            code = main(list(map(str, arguments)))
        except SystemExit as stop:
            code = 1
            print(stop, file=err)
    return Said(code, out.getvalue(), err.getvalue())


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The lines of one small run of the tasks that take little."""
    pytest.importorskip("tqdm")
    out = tmp_path_factory.mktemp("benchmarks") / "tiny.jsonl"
    tasks = [word for task in TRIED for word in ("--task", task)]
    done = _benchmarks(
        *("run", "--quick", "--quiet", "--case", "tiny", *tasks),
        *("--engines", "ours,ours-csr,ours-matrix,ours-sq8,faiss,faiss-sq8,matmul", "--threads", "1", "--out", out),
    )
    assert done.returncode == 0, done.stderr
    assert "queries/s" in done.stdout
    return out


def test_every_line_names_its_run_and_the_facts_are_there(stored: Path) -> None:
    lines = [json.loads(line) for line in stored.read_text().splitlines()]
    run = lines[0]
    assert run["kind"] == "run"
    assert run["threads"] == 1
    facts = {"schema", "date", "command", "commit", "cpu", "simd", "versions", "load", "skipped"}
    assert facts <= run.keys()
    assert {"torch", "numpy"} <= run["versions"].keys()
    assert {line["run"] for line in lines} == {run["run"]}
    assert [line["task"] for line in lines if line["kind"] == "done"] == list(TRIED)


def test_a_paired_search_gives_the_same_ids(stored: Path) -> None:
    task = latest([stored])["tiny", "search"]
    ours = task.pick(engine="ours")
    assert [row["nq"] for row in ours] == list(CASES["tiny"].nqs)
    for row in ours:
        assert row["seconds_low"] <= row["seconds"] <= row["seconds_high"]
        assert row["qps"] == pytest.approx(row["nq"] / row["seconds"])
        assert 0 < row["recall"] <= 1
        assert row["calls"] > 0
        assert row["peak_growth_bytes"] >= 0
    if "faiss" in task.facts["skipped"]:
        return
    assert all(row["agreement"] == 1 for row in ours)
    assert TO_FAISS.at(task.rows, {"engine": "ours", "nq": 1}) > 0


def test_brute_force_by_a_product_finds_all(stored: Path) -> None:
    assert {row["recall"] for row in latest([stored])["tiny", "search"].pick(engine="matmul")} == {1.0}


def test_figures_of_an_accelerator_are_kept_apart(stored: Path, tmp_path: Path) -> None:
    """In a file of their own and on a page of their own, also where lines of both are in one file."""
    pytest.importorskip("matplotlib")
    lines = [json.loads(line) for line in stored.read_text().splitlines()]
    lines = [line for line in lines if line.get("task") in (None, "search")]
    other = [{**line, "run": "on-a-card"} for line in lines]
    other[0] |= {"device": "cuda", "device_name": "Some Card", "command": "python -m benchmarks run --device cuda"}
    both = tmp_path / "both.jsonl"
    both.write_text("\n".join(json.dumps(line) for line in [*lines, *other]))
    assert latest([both], "cuda")["tiny", "search"].facts["run"] == "on-a-card"
    assert latest([both], "cpu")["tiny", "search"].facts["run"] != "on-a-card"
    for name in READMES:
        (tmp_path / name).write_text(README)
    done = _benchmarks("report", both, "--root", tmp_path, "--device", "cuda")
    assert done.returncode == 0, done.stderr
    (written,) = (tmp_path / "docs").glob("*.md")
    assert written.name == "benchmarks-cuda.md"
    text = written.read_text()
    assert text.startswith("# Benchmarks on an accelerator: Some Card\n")
    assert "*Some Card; host " in text
    assert "(img/cuda/search-tiny.svg)" in text
    assert (tmp_path / "docs" / "img" / "cuda" / "search-tiny.svg").exists()
    assert all((tmp_path / name).read_text() == README for name in READMES)


def test_a_device_that_is_not_there_is_an_error(tmp_path: Path) -> None:
    out = tmp_path / "none.jsonl"
    done = _benchmarks("run", "--case", "tiny", "--task", "search", "--device", "hpu", "--out", out)
    assert done.returncode == 1
    assert "--device hpu: the accelerator that torch" in done.stderr
    assert not out.exists()


def test_the_floor_stands_beside_the_search(stored: Path) -> None:
    rows = latest([stored])["tiny", "search"].rows
    (floor,) = {row["floor"] for row in rows}
    assert floor > 0
    assert TABLES["search"].figures[0].at(rows, {"engine": "ours"}) == max(
        row["qps"] / floor for row in rows if row["engine"] == "ours"
    )


def test_quantized_indexes_take_less_memory_on_the_same_lists(stored: Path) -> None:
    task = latest([stored])["tiny", "quantizers"]
    for nprobe in task.values("nprobe"):
        found = {row["engine"]: row for row in task.pick(nprobe=nprobe, nq=1)}
        assert found["ours-sq8"]["bytes"] < found["ours"]["bytes"]
        assert found["ours-sq8"]["recall"] == pytest.approx(found["ours"]["recall"], abs=0.05)
        if "faiss-sq8" in found:
            assert found["faiss-sq8"]["bytes"] < found["faiss"]["bytes"]
            assert found["faiss"]["recall"] == found["ours"]["recall"]


def test_figures_of_other_machines_stay_out_of_the_pages(stored: Path, tmp_path: Path) -> None:
    text = stored.read_text().replace('"case": "tiny"', '"case": "headline"')
    lines = [json.loads(line) for line in text.splitlines()]
    other = [{**line, "run": "other"} for line in lines if line.get("task") in (None, "add")]
    other[0] |= {"cpu": "another", "date": "2999-01-01"}
    both = tmp_path / "both.jsonl"
    both.write_text("\n".join(map(json.dumps, [*(line for line in lines if line.get("task") != "add"), *other])))
    found = figures([both])
    assert ("headline", "search") in found
    assert ("headline", "add") not in found


def test_a_page_may_have_the_table_of_any_task(stored: Path) -> None:
    text = fill("<!-- tiny/add:begin -->\n<!-- tiny/add:end -->\n<!-- none/add:begin -->\n", latest([stored]))
    assert "| ours |" in text
    assert MARKED.search(text)[2] == "tiny/add"


def test_documents_of_several_vectors_are_stored(tmp_path: Path) -> None:
    small = ("--documents", 30, "--document-tokens", 4, "--query-tokens", 2, "--d", 8, "--nlist", 8)
    done = _benchmarks("multi-vector", *small, "--threads", 1, "--out", tmp_path / "out.jsonl")
    assert done.returncode == 0, done.stderr
    assert "| all lists |" in done.stdout
    (task,) = results.history([tmp_path / "out.jsonl"])
    assert task.pick(engine="all lists")[0]["recall"] == 1
    assert latest([tmp_path / "out.jsonl"]) == {}, "not the corpus of the page"


def test_every_number_of_request_threads_is_served(stored: Path) -> None:
    rows = latest([stored])["tiny", "serving"].pick(engine="ours")
    assert [row["clients"] for row in rows] == [1, 2, 4, 8]
    for row in rows:
        assert row["requests"] >= row["clients"]
        assert 0 < row["p50"] <= row["p99"]
        assert row["qps"] > 0


def test_a_request_thread_asks_again_when_it_has_the_answer() -> None:
    asked: list[int] = []
    with ThreadPoolExecutor(3) as pool:
        latencies = serve(pool, 3, asked.append, 0.0)
    assert [len(one) for one in latencies] == [1, 1, 1], "one at least, however short the time"
    assert sorted(asked) == [0, 31, 62]


def test_busy_processes_end_with_the_measurement() -> None:
    with busy_processes(2) as busy:
        assert [process.poll() for process in busy] == [None, None]
    assert all(process.poll() is not None for process in busy)


def test_a_profile_accounts_for_the_whole_search() -> None:
    class Event(NamedTuple):
        key: str
        self_cpu_time_total: float  # microseconds
        cpu_time_total: float

    events = [Event(f"aten::op{i}", 1.0 * i, 50.0) for i in range(1, 15)] + [Event("search", 7.0, 112.0)]
    seconds = operators(events)
    assert seconds["search"] == pytest.approx(112e-6)
    assert sum(seconds.values()) == pytest.approx(2 * 112e-6)
    assert next(iter(seconds)) == "op14"
    assert "op1" not in seconds


@pytest.mark.long
def test_a_profile_is_a_task(tmp_path: Path) -> None:
    out = tmp_path / "profile.jsonl"
    done = _benchmarks("profile", "--case", "tiny", "--engines", "ours-csr", "--quick", "--quiet", "--out", out)
    assert done.returncode == 0, done.stderr
    task = latest([out])["tiny", "profile"]
    assert task.values("nq") == list(CASES["tiny"].profile_nqs)
    assert min(row["seconds"] for row in task.rows) >= 0


@pytest.mark.long
def test_contention_and_compiled_models_are_tasks(tmp_path: Path) -> None:
    out, threads = tmp_path / "more.jsonl", torch.get_num_threads()
    tasks = ("--task", "contention", "--task", "compiled")
    options = ("--engines", "ours", "--quick", "--quiet", "--threads", threads, "--out", out)
    done = _benchmarks("run", "--case", "tiny", *tasks, *options)
    assert done.returncode == 0, done.stderr
    assert torch.get_num_threads() == threads
    found = latest([out])
    assert found["tiny", "contention"].values("busy") == [0, 1, 2]
    models = found["tiny", "compiled"]
    assert models.pick(engine="eager", nq=1)
    assert all(row["agreement"] == 1 for row in models.rows if row["engine"] != "eager")


def test_the_page_on_other_libraries_says_what_they_can_do() -> None:
    """But for AOTInductor, which takes long, and of two libraries, as others are rarely installed."""
    tried = {feature: how for feature, how in peers.FEATURES.items() if feature != "AOTInductor"}
    with (
        patch.object(peers, "FEATURES", tried),
        patch.object(peers, "PEERS", {name: peers.PEERS[name] for name in ("here", "faiss")}),
    ):
        done = _benchmarks("peers", "--why")
    assert done.returncode == 0, done.stdout
    assert f"| a `torch.nn.Module` | yes |{' no |' if 'left out: faiss' not in done.stdout else ''}" in done.stdout


def test_auto_is_scored_on_what_was_measured(stored: Path) -> None:
    done = _benchmarks("score-auto", "--case", "tiny", "--preset", "latency", "--top", "2", "--file", stored)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("| 1. ") == 1
    assert "as it is" in done.stdout
    done = _benchmarks("score-auto", "--case", "tiny", "--weights", "7=1", "--file", stored)
    assert done.returncode == 1
    assert "nothing to score" in done.stdout


def test_a_score_weighs_batch_sizes() -> None:
    cells = [Cell("a", nq, nq, {"csr": 4.0 / nq, "matrix": 2.0}, ()) for nq in (1, 4)]
    assert score(cells, ["matrix", "csr"], lambda nq: 1.0) == (1.0, 1.0)
    assert score(cells, ["csr", "csr"], lambda nq: 1.0) == (pytest.approx(2**0.5), 2.0)
    assert score(cells, ["csr", "csr"], lambda nq: float(nq == 4)) == (1.0, 1.0)


def test_the_report_draws_the_tables_and_fills_both_readmes(stored: Path, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    for name in READMES:
        (tmp_path / name).write_text(README)
    # The READMEs show the headline: the same rows under its name. Of the other tasks one that is not drawn will do.
    copy = tmp_path / "lines.jsonl"
    lines = stored.read_text().replace('"case": "tiny"', '"case": "headline"').splitlines()
    copy.write_text("\n".join(line for line in lines if json.loads(line).get("task") in (None, "search", "pairs")))
    done = _benchmarks("report", copy, "--root", tmp_path)
    assert done.returncode == 0, done.stderr
    written = (tmp_path / "docs" / "benchmarks.md").read_text()
    assert "| ours |" in written
    assert {path.name for path in (tmp_path / "docs" / "img").iterdir()} == {"headline.svg", "search-headline.svg"}
    assert written.index("## Many queries at a time") < written.index("## Details: headline") < written.index("## Runs")
    assert (tmp_path / "docs" / "img" / "search-headline.svg").read_text().startswith("<?xml")
    for name in READMES:
        text = (tmp_path / name).read_text()
        assert text.startswith("before\n<!-- fast:begin -->")
        assert text.endswith("<!-- fast:end -->\nafter\n")
        assert "old figures" not in text
        assert "| nq 1 |" in text


def test_a_report_without_lines_says_so(tmp_path: Path) -> None:
    done = _benchmarks("report", tmp_path / "none.jsonl", "--root", tmp_path)
    assert done.returncode == 0
    assert "no finished measurement" in done.stdout
    assert not (tmp_path / "docs").exists()


def test_a_list_of_what_would_be_measured_measures_nothing(stored: Path) -> None:
    plan = ("run", "--case", "tiny", "--task", "search", "--out", stored)
    assert "commit" in _benchmarks(*plan, "--list").stdout
    before = stored.read_text()
    assert stored.read_text() == before


def test_an_unfinished_task_is_passed_over(stored: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken.jsonl"
    lines = stored.read_text().splitlines()
    broken.write_text("\n".join(line for line in lines if json.loads(line)["kind"] != "done"))
    assert latest([broken]) == {}


def test_a_sweep_over_other_values_stays_out_of_the_report(tmp_path: Path) -> None:
    out = tmp_path / "sweep.jsonl"
    options = ("--case", "tiny", "--values", "4,8", "--engines", "ours", "--quick", "--quiet", "--out", out)
    done = _benchmarks("sweep-nq", *options)
    assert done.returncode == 0, done.stderr
    assert "nq 4 | nq 8" in done.stdout
    (task,) = results.history([out])
    assert task.values("nq") == [4, 8]
    assert latest([out]) == {}


def test_a_command_that_is_told_nonsense_says_what_would_work() -> None:
    done = _benchmarks("sweep-ivf", "--values", "512,32")
    assert done.returncode == 1
    assert "--values must be like 128:4,128:8, got '512,32'" in done.stderr


def test_the_program_lists_its_commands_and_imports_nothing_heavy_for_it() -> None:
    script = "import sys; from benchmarks.__main__ import main\ntry: main(['--help'])\n"
    script += "finally: assert not {'torch', 'numpy'} & sys.modules.keys()"
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert all(name in done.stdout for name in COMMANDS)


def test_the_plan_names_what_exists() -> None:
    assert PLAN.keys() <= CASES.keys()
    assert {task for planned in PLAN.values() for task in planned} == TASKS.keys() == TABLES.keys()


def test_a_pivot_table_sorts_numbers_and_leaves_out_empty_columns() -> None:
    note = Figure("", "v", "{:.1f}x".format, over={"name": "b"})
    table = Table(
        "", "corner", ("name",), ("n",), Figure("", "v", "{:g}".format, note=note),
        (Figure("most", "v", "{:g}".format, max), Figure("nowhere", "w")),
    )  # fmt: skip
    rows = [{"name": "a", "n": 1_000, "v": 6}, {"name": "b", "n": 1_000, "v": 3}, {"name": "a", "n": 8, "v": 4}]
    assert pivot(table, rows).splitlines() == [
        "| corner | n 8 | n 1,000 | most |",
        "| --- | ---: | ---: | ---: |",
        "| a | 4 | 6 (2.0x) | 6 |",
        "| b | – | 3 | 3 |",
    ]


def test_a_table_for_each_value_of_the_block() -> None:
    table = Table("", "corner", ("name",), ("level",), Figure("", "v", "{:g}".format), block="nq")
    rows = [{"name": "a", "level": "low", "nq": nq, "v": nq / 2} for nq in (8, 1)]
    first, second = pivot(table, rows).split("\n\n")
    assert first.splitlines()[::2] == ["| corner, nq 1 | low |", "| a | 0.5 |"]
    assert second.splitlines()[::2] == ["| corner, nq 8 | low |", "| a | 4 |"]


def test_a_ratio_is_to_the_median_of_the_same_cell() -> None:
    seconds = {("ours", "add"): (2, 4, 6), ("faiss", "add"): (1, 1, 5), ("faiss", "other"): (100,)}
    rows = [{"engine": e, "what": w, "seconds": value} for (e, w), values in seconds.items() for value in values]
    ratio = Figure("", "seconds", where={"what": "add"}, over={"engine": "faiss"})
    assert ratio.at(rows, {"engine": "ours"}) == 4
    assert ratio.at(rows, {"engine": "nobody"}) is None


@pytest.mark.parametrize("metric", ["l2", "ip"])
def test_brute_force_orders_by_the_exact_score(metric: str) -> None:
    random = np.random.default_rng(0)
    base = random.standard_normal((300, 7), dtype=np.float32)
    queries = random.standard_normal((70, 7), dtype=np.float32)
    truth = answers.brute_force(base, queries, 5, metric)
    x, q = base.astype(np.float64), queries.astype(np.float64)
    scores = q @ x.T if metric == "ip" else -((q[:, None] - x[None]) ** 2).sum(2)
    assert np.array_equal(truth, np.argsort(-scores, axis=1)[:, :5])
    assert answers.recall(base, queries, truth, truth, metric) == 1


def test_recall_counts_ties_and_no_id_twice() -> None:
    base = np.array([[0.0], [1.0], [1.0], [5.0]], dtype=np.float32)
    query = np.array([[0.0]], dtype=np.float32)
    truth = np.array([[0, 1]])
    assert answers.recall(base, query, np.array([[0, 2]]), truth, "l2") == 1  # as near as row 1
    assert answers.recall(base, query, np.array([[0, 0]]), truth, "l2") == 0.5
    assert answers.recall(base, query, np.array([[0, 3]]), truth, "l2") == 0.5
    assert answers.recall(base, query, np.array([[0, -1]]), truth, "l2") == 0.5


def test_agreement_is_modulo_ties_only() -> None:
    base = np.array([[0.0], [1.0], [1.0], [0.5]], dtype=np.float32)
    query = np.array([[0.0]], dtype=np.float32)
    other = np.array([[0, 1]])
    assert answers.agreement(base, query, np.array([[1, 0]]), other, "l2") == 1
    assert answers.agreement(base, query, np.array([[0, 2]]), other, "l2") == 1
    assert answers.agreement(base, query, np.array([[0, 3]]), other, "l2") == 0.5  # better, but not the same
    assert answers.agreement(base, query, np.array([[0, -1]]), np.array([[0, -1]]), "l2") == 1
    assert answers.agreement(base, query, np.array([[0, 1]]), np.array([[0, -1]]), "l2") == 0.5
