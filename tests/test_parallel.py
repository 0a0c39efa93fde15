"""Indexes in data-parallel models, in real processes."""

from __future__ import annotations

from tests import jobs, processes


def test_ranks_with_different_rows_are_told_of_it():
    assert processes.run(jobs.wrapped_with_different_rows, 2) == [0, 0]
