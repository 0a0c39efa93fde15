"""What is made of stored figures: the benchmarks page, its pictures, and parts of other pages. Nothing is measured."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks import results
from benchmarks.aims import missed
from benchmarks.blocks import BLOCKS, fill
from benchmarks.commands.report import stored as figures
from benchmarks.commands.report import texts
from benchmarks.tables import TABLES

ROOT = Path(__file__).resolve().parents[1]


def test_the_page_of_quantizers_shows_the_nprobe_of_the_case() -> None:
    rows = [
        {"engine": "ours", "nq": 1, "nprobe": nprobe, "qps": 10, "recall": 0.5, "bytes": 500, "codes": 0, "raw": 512}
        for nprobe in (8, 32)
    ]
    facts = {"cpu": "", "threads": 1, "date": "", "commit": "", "changed": False, "command": "", "run": ""}
    page = "<!-- quantizers:begin -->\n<!-- quantizers:end -->\n"
    text = fill(page, {("headline", "quantizers"): results.TaskRun("headline", "quantizers", facts, rows)})
    assert text.count("| ours | 10 | 0.5000 | 500 | 0.977 |") == 1
    assert fill(text, {}) == text, "without figures it stays as it is"


def test_aims_that_are_missed_are_listed() -> None:
    rows = [{"engine": "ours", "nq": 1, "qps": 30, "rows_scored": 33}, {"engine": "faiss", "nq": 1, "qps": 10}]
    rows += [{"engine": "ours", "nq": 8, "qps": 90, "rows_scored": 33}, {"engine": "faiss", "nq": 8, "qps": 10}]
    task = results.TaskRun("headline", "search", {"simd": ["avx2", "avx512_vnni"]}, rows)
    said, table = missed({("headline", "search"): task}).split("\n\n")
    assert said.startswith("1 of 2 aims are reached")
    assert table.splitlines()[2:] == ["| headline, ours, nq 1: queries/s / faiss's | ≥ 3.8× | 3.00× |"]
    assert missed({("headline", "search"): results.TaskRun("headline", "search", {"simd": []}, rows)}) == ""
    without_codes = [{name: value for name, value in row.items() if name != "rows_scored"} for row in rows]
    assert missed({("headline", "search"): results.TaskRun("headline", "search", task.facts, without_codes)}) == ""


def test_aims_of_compiled_models_and_of_threads() -> None:
    rows = [{"engine": "eager", "nq": 1, "seconds": 1e-3}, {"engine": "compiled", "nq": 1, "seconds": 1.2e-3}]
    compiled = results.TaskRun("headline", "compiled", {}, rows)
    assert "| headline, compiled model, nq 1: queries/s | 926 | 833 |" in missed({("headline", "compiled"): compiled})
    rows = [
        {"engine": "ours", "busy": 0, "nq": 512, "threads": threads, "qps": qps} for threads, qps in ((1, 10), (2, 9))
    ]
    contention = results.TaskRun("headline", "contention", {"threads": 2}, rows)
    assert missed({("headline", "contention"): contention}) == "1 of 1 aims are reached."


def test_japanese_pages_have_the_same_figures() -> None:
    tasks = figures([results.DEFAULT])
    for name in ("choice", "fast"):
        page = f"<!-- {name}:begin -->\n<!-- {name}:end -->\n"
        english, japanese = fill(page, tasks), fill(page, tasks, japanese=True)
        assert english != page
        assert english.count("|") == japanese.count("|")
    assert {"choice", "fast", "quantizers", "maxsim"} == BLOCKS.keys()


def test_pages_agree_with_the_stored_figures() -> None:
    """What `python -m benchmarks report` writes is what is there."""
    tasks = figures([results.DEFAULT])
    for path, text in texts(tasks, ROOT):
        assert path.read_text(encoding="utf-8") == text, f"{path.name} is stale: run `python -m benchmarks report`"


@pytest.mark.long
def test_pictures_agree_with_the_stored_figures() -> None:
    pytest.importorskip("matplotlib")
    from benchmarks.plots import plots

    drawn = plots(figures([results.DEFAULT]))
    there = {path.name for path in (ROOT / "docs" / "img").glob("*.svg")}
    assert drawn.keys() <= there
    assert {name for name in there - drawn.keys() if name.partition("-")[0] in TABLES} == set()
    for name, draw in drawn.items():
        assert (ROOT / "docs" / "img" / name).read_text(encoding="utf-8") == draw(), f"{name} is stale"
