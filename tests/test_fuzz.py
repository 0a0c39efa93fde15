"""The differential fuzzer detects faults: each test adds one to the library and expects a report."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from tests.fuzz import codes
from tests.fuzz.__main__ import main
from tests.fuzz.answers import Query
from tests.fuzz.machine import Fuzz
from tests.problems import METRICS
from torch_ivf_module import native
from torch_ivf_module.index.base import IndexBase
from torch_ivf_module.index.ivf import IndexIVF

QUERIES = dict(data="plain", count=9, seed=1, own=True)


def _wrong_id(result: Any) -> Any:
    D, I, *rest = result
    I[0, 0] = I[0, 1]
    return D, I, *rest


def _row_missed(result: Any) -> Any:
    D, I, *rest = result
    return D.roll(-1, 1), I.roll(-1, 1), *rest


def _wrong_distance(result: Any) -> Any:
    D, I, *rest = result
    return D * 1.001, I, *rest


def _last_result_lost(result: Any) -> Any:
    lims, D, I = result
    return lims.clamp(max=len(D) - 1), D[:-1], I[:-1]


def _rounded(result: Any) -> Any:
    return torch.nextafter(result, torch.full_like(result, torch.inf))


def _search(state: Fuzz) -> None:
    state.search(mode="csr", k=5, nprobe=2, **QUERIES)


def _search_with(state: Fuzz) -> None:
    state.search_with("matrix", "plain", 1, "nan", 5, 2, 40, "exact", "some")


def _search_filtered(state: Fuzz) -> None:
    state.search_filtered("auto", "plain", 9, 1, "nan", 5, 3, None, "speed", "lists", "few", None)


def _range_search_filtered(state: Fuzz) -> None:
    state.search_filtered("csr", "plain", 9, 1, None, 5, 3, None, "speed", "masks", "some", 1.001)


def _search_by_group(state: Fuzz) -> None:
    state.add("plain", 50, 3, "few")
    state.search_filtered("auto", "plain", 9, 1, None, 5, 3, None, "speed", None, None, None, "groups")


def _group_by(state: Fuzz) -> None:
    state.remove_ids("all", 1)
    state.add("plain", 50, 3, "few")
    state.search_filtered("auto", "plain", 9, 3, None, 9, 5, None, "speed", None, None, None, "group_by")


def _modes_agree(state: Fuzz) -> None:
    state.modes_agree("plain", 1, 3)


def _against_faiss(state: Fuzz) -> None:
    state.as_faiss(k=5, nprobe=2, **QUERIES)


def _search_and_reconstruct(state: Fuzz) -> None:
    state.search_and_reconstruct(k=5, nprobe=2, **QUERIES)


def _range_search(state: Fuzz) -> None:
    state.range_search(spoilt=None, nprobe=3, factor=2.0, choice=None, **QUERIES)


def _reconstruct(state: Fuzz) -> None:
    state.reconstruct(5)


def _remove(state: Fuzz) -> None:
    state.remove_ids("some", 1)


def _convert(state: Fuzz) -> None:
    state.convert("half", by_to=False, nested=False)
    state.counts()


FAULTS: list[tuple[str, Callable[[Any], Any], Callable[[Fuzz], None]]] = [
    *(("search", fault, call) for fault in (_wrong_id, _row_missed) for call in (_search, _against_faiss)),
    ("search", _wrong_distance, _search),
    ("search", _row_missed, _modes_agree),
    *(("search", _wrong_id, call) for call in (_search_with, _search_filtered, _search_by_group)),
    ("search_and_reconstruct", _row_missed, _search_and_reconstruct),
    ("search_and_reconstruct", lambda found: (*found[:2], found[2].roll(1, 1)), _search_and_reconstruct),
    *(("range_search", _last_result_lost, call) for call in (_range_search, _range_search_filtered)),
    ("reconstruct", _rounded, _reconstruct),
    ("remove_ids", lambda count: count + 1, _remove),
    ("half", lambda index: index.remove_ids(index.list_ids[-1:]), _convert),
]


@pytest.fixture(params=METRICS)
def state(request):
    """A filled inverted file with pending rows, and its model."""
    state = Fuzz()
    state.start(ivf=True, metric=request.param, dtype="float32", d=8, nlist=5, data="plain", seed=0)
    state.add("plain", 60, 0)
    state.add_with_ids("lattice", 12, 1, "present")
    return state


@pytest.mark.parametrize(("name", "fault", "call"), FAULTS)
def test_a_wrong_result_is_detected(state, monkeypatch, name, fault, call):
    right = getattr(IndexIVF, name)
    monkeypatch.setattr(IndexIVF, name, lambda *given, **settings: fault(right(*given, **settings)))
    with pytest.raises(AssertionError):
        call(state)


@pytest.mark.parametrize("call", dict.fromkeys([*(call for _, _, call in FAULTS), _group_by]))
def test_correct_results_are_no_mismatch(state, call):
    call(state)


@pytest.mark.parametrize(
    ("call", "field"),
    [
        *((call, field) for call in (_search_filtered, _range_search_filtered) for field in ("selector", "exclude")),
        (_search_by_group, "groups"),
        (_group_by, "group_by"),
    ],
)
def test_a_filter_that_is_ignored_is_detected(state, monkeypatch, call, field):
    right = Query.params
    monkeypatch.setattr(Query, "params", lambda self, **more: replace(right(self, **more), **{field: None}))
    with pytest.raises(AssertionError):
        call(state)


@pytest.mark.parametrize("rebalanced", [False, True])
def test_a_row_in_a_wrong_list_is_detected(state, rebalanced):
    if rebalanced:
        state.add("translated", 40, 5)
        state.rebalance(1 << 16, 1)
        state.state()
    index = state.index
    index.list_offsets = index.list_offsets.index_add(0, torch.tensor([2]), torch.tensor([1]))
    with pytest.raises(AssertionError, match="not its nearest"):
        state.state()


def test_a_short_run_finds_nothing(capsys):
    """The CI has a longer run."""
    assert main(["--cases", "10"]) == 0
    said = r"^(\d+) cases, \d+ operations and \d+ comparisons in \d+ s: no mismatch$"
    found = re.search(said, capsys.readouterr().out)
    assert found
    assert int(found[1]) >= 10  # one that Hypothesis gave up for another counts too


def test_a_report_can_be_replayed(monkeypatch, tmp_path, capsys):
    right = IndexIVF.remove_ids
    monkeypatch.setattr(IndexIVF, "remove_ids", lambda self, ids: right(self, ids) + 1)
    assert main(["--cases", "60", "--seed", "3"]) == 1
    printed = capsys.readouterr().out
    assert re.search(r"\d+ cases, \d+ operations and \d+ comparisons in \d+ s: a mismatch at --seed \d+$", printed)
    program = printed[printed.rindex("from tests.fuzz.machine") : printed.rindex("\n\n")]
    calls = [line for line in program.splitlines() if line.startswith("state.") and "counts" not in line]
    assert len(calls) == 2, "the report is reduced to the calls that are needed"
    assert re.match(r"state\.(remove_ids|change_nothing)\(", calls[-1])
    file = tmp_path / "sequence.py"
    file.write_text(program)
    with pytest.raises(AssertionError):
        main(["--replay", str(file)])
    monkeypatch.undo()
    assert main(["--replay", str(file)]) == 0


# --- codes --------------------------------------------------------------------------------------------------

needs_kernel = pytest.mark.skipif(not native.available(), reason="codes are for the kernel")


@needs_kernel
def test_a_short_run_of_hard_queries_for_codes_finds_nothing(capsys):
    assert codes.main(["--queries", "6000"]) == 0
    printed = capsys.readouterr().out
    assert re.search(r"^[a-z0-9_]+: [\d,]+ queries of [\d,]+ indexes in \d+ s, seeds from 0 to \d+\.", printed)
    assert printed.endswith("no mismatch\n")


def _row_missed_with_codes(index: IndexBase, result: Any) -> Any:
    D, I = result
    worst = torch.inf if index.metric == "l2" else -torch.inf
    D, I = (torch.cat([part[:, 1:], torch.full_like(part[:, :1], end)], 1) for part, end in ((D, worst), (I, -1)))
    return D, I


@needs_kernel
@pytest.mark.parametrize("setting", [8, None])
@pytest.mark.parametrize(
    "fault",
    [
        _row_missed_with_codes,
        lambda index, result: _wrong_distance(result),
        lambda index, result: (result[0], torch.where(result[1] == -1, -1, result[1] * 0)),
    ],
)
def test_a_wrong_answer_with_or_without_codes_is_detected(monkeypatch, capsys, setting, fault):
    right = IndexBase.search

    def search(self: Any, x: Any, k: int, *, params: Any = None) -> Any:
        result = right(self, x, k, params=params)
        return fault(self, result) if self.codes == setting else result

    monkeypatch.setattr(IndexBase, "search", search)
    assert codes.main(["--queries", "3000"]) == 1
    assert re.search(r"mismatch: --seed \d+ --queries 1$", capsys.readouterr().out)
