"""The tables of docs/scale.md are those of what was measured."""

from __future__ import annotations

from benchmarks import scale


def test_the_page_has_the_tables_of_the_stored_measurements():
    text = scale.PAGE.read_text(encoding="utf-8")
    assert scale.page(text, scale.lines()) == text


def test_the_formulas():
    sizes = {"trained_on": 100, "niter": 2, "n": 1000, "d": 8, "nlist": 5, "bytes": 9000}
    build = {"part": "build", "processes": 1, **sizes}
    search = {"part": "search", "rows_read": 300.0, "queries_per_second": {"one query at a time, warm": 10.0}}
    rates = scale.rates([{**build, "seconds": {"train": 4.0, "assign": 8.0, "write": 3.0}}, search])
    assert rates == (2 * 100 * 5 * 8 * 2 / 4, 2 * 1000 * 5 * 8 / 8, 3000, 10 * 300 * 8)
