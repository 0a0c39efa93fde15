"""The differential fuzz finds faults: each test plants one in the library and looks for the report of it."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch

from tests.fuzz.__main__ import main, mismatch
from torch_ivf_module.index.base import IndexBase

CASES = 80


def _wrong_id(result: Any) -> Any:
    D, I = result
    return D, I.masked_fill(I == 7, 8)


def _wrong_distance(result: Any) -> Any:
    D, I = result
    return D * 1.001, I


def _last_result_lost(result: Any) -> Any:
    lims, D, I = result
    return lims.clamp(max=max(0, len(D) - 1)), D[:-1], I[:-1]


def _off_by_a_rounding(result: Any) -> Any:
    return torch.nextafter(result, torch.full_like(result, torch.inf))


FAULTS: dict[str, Callable[[Any], Any]] = {
    "search": _wrong_id,
    "search_and_reconstruct": _wrong_distance,
    "range_search": _last_result_lost,
    "reconstruct": _off_by_a_rounding,
    "remove_ids": lambda count: count + 1,
}


@pytest.fixture
def plant(monkeypatch):
    def plant(name: str, fault: Callable[[Any], Any]) -> None:
        right = getattr(IndexBase, name)
        monkeypatch.setattr(IndexBase, name, lambda *given, **settings: fault(right(*given, **settings)))

    return plant


def last_call(report: str | None) -> str:
    """The call that a report ends with."""
    assert report, "the fault was not found"
    return re.findall(r"^state\.(\w+)\(", report, re.MULTILINE)[-1]


@pytest.mark.parametrize("name", FAULTS)
def test_a_wrong_result_is_found(plant, name):
    plant(name, FAULTS[name])
    assert last_call(mismatch(1, CASES, shrink=False)) == name


def test_rows_lost_by_a_conversion_are_found(monkeypatch):
    half = IndexBase.half
    monkeypatch.setattr(IndexBase, "half", lambda self: (self.remove_ids(torch.tensor([3])), half(self))[1])
    assert last_call(mismatch(1, CASES, shrink=False)) in ("convert", "counts")


def test_a_report_can_be_replayed(monkeypatch, plant, tmp_path, capsys):
    plant("remove_ids", FAULTS["remove_ids"])
    assert main(["--cases", str(CASES), "--seed", "3"]) == 1
    printed = capsys.readouterr().out
    assert re.search(r"\d+ cases, \d+ operations and \d+ comparisons in \d+ s: a mismatch at --seed \d+$", printed)
    program = printed[printed.index("from tests.fuzz.machine") : printed.rindex("\n\n")]
    assert program.count("remove_ids") == 1, "what does not matter is left out"
    file = tmp_path / "sequence.py"
    file.write_text(program)
    with pytest.raises(AssertionError):
        main(["--replay", str(file)])
    monkeypatch.undo()
    assert main(["--replay", str(file)]) == 0
