"""The tables and the plot of docs/drift.md are those of what was measured."""

from __future__ import annotations

import pytest

from benchmarks import drift


def test_the_page_has_the_tables_of_the_stored_measurements():
    text = drift.PAGE.read_text(encoding="utf-8")
    assert "<!-- recalls:begin -->\n\n|" in text
    assert "<!-- costs:begin -->\n\n|" in text
    assert drift.page(text, drift.lines()) == text


def test_the_plot_is_that_of_the_stored_measurements():
    pytest.importorskip("matplotlib")
    assert drift.plot(drift.lines()) == drift.PLOT.read_text(encoding="utf-8")


def test_every_way_was_measured_with_as_many_vectors_and_lists():
    assert len(drift.lines()) == len(drift.DATA) * len(drift.NAMES)
    assert len({(line["n"], line["nlist"], line["threads"]) for line in drift.lines()}) == 1


def test_a_small_run(tmp_path, monkeypatch):
    """Every way, so that the command works: lists of the right lengths, and what was moved and read."""
    pytest.importorskip("faiss")
    monkeypatch.setattr("sys.argv", ["drift", "measure", "--rows", "8000", "--nlist", "16", "--data", "clusters",
                                     "--results", str(tmp_path / "drift.jsonl"), "--threads", "1"])  # fmt: skip
    monkeypatch.setattr(drift, "UPDATES", 3)
    monkeypatch.setattr(drift.machine, "set_threads", lambda threads: None)  # which would last
    drift.main()
    measured = {line["way"]: line for line in drift.lines(tmp_path / "drift.jsonl")}
    assert list(measured) == list(drift.NAMES)
    assert measured["never"]["moved"] == measured["faiss"]["moved"] == 0
    assert measured["auto 1"]["calls"] > 0
    assert measured["auto 1"]["steps"][-1]["imbalance"] < measured["never"]["steps"][-1]["imbalance"]
