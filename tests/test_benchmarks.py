"""The instrument end to end on a tiny case, and the arithmetic its verdicts rest on. No time is asserted."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from benchmarks import answers
from benchmarks.cases import CASES, PLAN
from benchmarks.results import TaskRun, latest
from benchmarks.targets import TARGETS
from benchmarks.verdicts import figure

ROOT = Path(__file__).resolve().parents[1]
TRIED = ("search", "add", "budgets", "filters", "maintenance")
README = "before\n<!-- benchmark:begin -->\nold figures\n<!-- benchmark:end -->\nafter\n"


def _python(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    """In a process of its own: the instrument sets thread counts for good."""
    command = [sys.executable, "-W", "ignore", "-m", *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The lines of one small run: a paired search, a build, what SearchParams can ask for, the changing index."""
    pytest.importorskip("tqdm")
    out = tmp_path_factory.mktemp("benchmarks") / "tiny.jsonl"
    tasks = [word for task in TRIED for word in ("--task", task)]
    done = _python(
        "benchmarks.run",
        *("--quick", "--quiet", "--case", "tiny", *tasks),
        *("--engines", "ours,faiss", "--threads", "1", "--out", out),
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
    assert task.ratio("qps", "ours", nq=1) is not None


def test_the_report_writes_a_table_and_fills_the_readme(stored: Path, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    (tmp_path / "README.md").write_text(README)
    # The README shows the headline: the same rows under its name.
    copy = tmp_path / "lines.jsonl"
    copy.write_text(stored.read_text().replace('"case": "tiny"', '"case": "headline"'))
    done = _python("benchmarks.report", copy, "--root", tmp_path)
    assert done.returncode == 0, done.stderr
    page = (tmp_path / "docs" / "benchmarks.md").read_text()
    assert "| ours |" in page
    assert "not measured" in page
    assert (tmp_path / "docs" / "img" / "search-headline.svg").read_text().startswith("<?xml")
    readme = (tmp_path / "README.md").read_text()
    assert readme.startswith("before\n<!-- benchmark:begin -->")
    assert readme.endswith("<!-- benchmark:end -->\nafter\n")
    assert "old figures" not in readme
    assert "| ours |" in readme


def test_a_report_without_lines_says_so(tmp_path: Path) -> None:
    done = _python("benchmarks.report", tmp_path / "none.jsonl", "--root", tmp_path)
    assert done.returncode == 0
    assert "no finished measurement" in done.stdout
    assert not (tmp_path / "docs").exists()


def test_an_unfinished_task_is_passed_over(stored: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken.jsonl"
    lines = stored.read_text().splitlines()
    broken.write_text("\n".join(line for line in lines if json.loads(line)["kind"] != "done"))
    assert latest([broken]) == {}


def test_plan_and_targets_name_what_exists() -> None:
    assert PLAN.keys() <= CASES.keys()
    assert all(target.task in PLAN[target.case] for target in TARGETS)


def test_a_target_without_rows_stays_open() -> None:
    assert all(figure(target, TaskRun(target.case, target.task, {})) is None for target in TARGETS)


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
