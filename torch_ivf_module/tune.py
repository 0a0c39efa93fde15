"""Finding the cheapest search that reaches a recall.

Q queries, k results, T true neighbours a query.
"""

from __future__ import annotations

import numbers
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ._optional import require
from .index import IndexIVF, SearchParams, validation
from .params import positive

_CLOCKED = 3  # times a setting is timed; the fastest counts, as the rest is what the machine did besides
_UNITS = 64  # budgets that are told apart: a step is a 64th of the rows, and so of the time, which clocking cannot tell
_BUDGETS = ("max_codes", "candidate_budget")  # the fields of SearchParams that limit the rows of a query


class Point(NamedTuple):
    """A setting that was measured."""

    nprobe: int
    budget: int | None  # rows a query may read, None for no limit
    recall: float
    seconds: float  # per query, in one batch of all queries


class Tuned(NamedTuple):
    """The result of `tune`."""

    nprobe: int
    budget: int | None
    recall: float
    seconds: float
    reached: bool  # whether the recall is at least target_recall
    params: SearchParams  # the settings for `index.search(x, k, params=...)`
    curve: list[Point]  # all measured settings, by nprobe and budget


def tune(
    index: IndexIVF,
    queries: Tensor,
    ground_truth: Tensor | None = None,
    target_recall: float = 0.95,
    k: int = 20,
    *,
    budget: str | None = "max_codes",
    apply: bool = False,
    verbose: bool = False,
) -> Tuned:
    """Find the smallest nprobe, and then the smallest budget of rows, that reach a recall on `queries`.

    Both are found by bisection: first the smallest nprobe without a budget, then the smallest budget with this nprobe,
    to within 1/64 of the rows that a query reads. If the budget does not make the search faster, none is used.

    Parameters
    ----------
    index : a trained inverted file with vectors. Its setting `max_codes` is ignored.
    queries : (nq, d), typical queries that are not in the index: for stored vectors the recall would be too high.
    ground_truth : (nq, T) int64 ids of the true neighbours, T >= k, nearest first, -1 for none. By default they are
        computed by an exact search, which may take long.
    target_recall : the share of the k true neighbours to find, above 0 and at most 1.
    k : results per query.
    budget : the field of `SearchParams` that limits rows, "max_codes" or "candidate_budget"; None tunes nprobe alone.
    apply : if the target is reached, set `index.nprobe`, and set `index.max_codes` to the budget ("max_codes") or to
        None. By default the index is not changed.
    verbose : show a progress bar (extra `progress`).

    Even a search of all lists may miss the target, for example if ids of `ground_truth` are not in the index. Then
    `Tuned.reached` is False, and `Tuned.nprobe` is `nlist`. Raises ValueError, TypeError or RuntimeError (empty index),
    which name the argument.

    >>> from torch_ivf_module import IndexIVFFlat
    >>> x = torch.randn(2000, 16, generator=torch.Generator().manual_seed(0))
    >>> index = IndexIVFFlat(16, nlist=16).train(x)
    >>> index.add(x[:1900])
    >>> found = tune(index, x[1900:], target_recall=0.9, k=5)
    >>> found.reached and found.recall >= 0.9
    True
    >>> D, I = index.search(x[1900:], 5, params=found.params)
    """
    if not isinstance(index, IndexIVF):
        raise TypeError(f"index must be an inverted file, got {type(index).__name__}: there is nothing else to tune")
    queries, k = validation.vectors(queries, "queries", index.d, index.device).detach(), positive(k, "k")
    if not queries.shape[0]:
        raise ValueError("queries must have at least one row, got none")
    if not isinstance(target_recall, numbers.Real):
        raise TypeError(f"target_recall must be a number, got {type(target_recall).__name__}")
    if not 0 < target_recall <= 1:
        raise ValueError(f"target_recall must be above 0 and at most 1, got {target_recall}")
    if not index.ntotal:
        raise RuntimeError("index is empty: add vectors before tuning it")
    if budget is not None and budget not in _BUDGETS:
        raise ValueError(f"budget must be one of {', '.join(map(repr, _BUDGETS))}, or None, got {budget!r}")
    bar = require("tqdm", "progress").tqdm(desc="tune", unit="search") if verbose else None
    try:
        found = _Trials(index, queries, ground_truth, k, budget, bar).cheapest(target_recall)
    finally:
        if bar is not None:
            bar.close()
    if apply and found.reached:
        index.nprobe, index.max_codes = found.nprobe, found.budget if budget == "max_codes" else None
    return found


class _Trials:
    """The settings tried so far, each once."""

    def __init__(
        self, index: IndexIVF, queries: Tensor, truth: Tensor | None, k: int, budget: str | None, bar: Any
    ) -> None:
        self.index, self.queries, self.k, self.budget, self.bar = index, queries, k, budget, bar
        self.seen: dict[tuple[int, int | None], Point] = {}
        self.truth = self._exact() if truth is None else self._checked(truth)

    def cheapest(self, target: float) -> Tuned:
        """The least nprobe and budget that reach the recall."""
        nprobe = _least(self.index.nlist, lambda value: self.point(value).recall >= target)
        best = self.point(nprobe)
        rows = int(self.index.list_sizes().topk(nprobe).values.sum())  # no query reads more
        if self.budget is not None and best.recall >= target:
            unit = -(-rows // _UNITS)
            units = _least(_UNITS, lambda value: self.point(nprobe, value * unit).recall >= target)
            limited = self.point(nprobe, units * unit)
            if limited.recall >= target and limited.seconds < best.seconds:
                best = limited
        curve = sorted(self.seen.values(), key=lambda point: (point.nprobe, point.budget or rows + _UNITS))
        return Tuned(*best, best.recall >= target, self.params(best.nprobe, best.budget), curve)

    def point(self, nprobe: int, budget: int | None = None) -> Point:
        """What a setting gives, measured once."""
        if (nprobe, budget) not in self.seen:
            params, spent = self.params(nprobe, budget), []
            for _ in range(_CLOCKED):
                start = time.perf_counter()
                ids = self.index.search(self.queries, self.k, params=params)[1]
                ids[:1].cpu()  # waits for the device
                spent.append(time.perf_counter() - start)
            found = Point(nprobe, budget, recall(ids, self.truth), min(spent) / self.queries.shape[0])
            self.seen[nprobe, budget] = found
            self._say(f"nprobe {nprobe}, {'all' if budget is None else f'{budget:,}'} rows: recall {found.recall:.3f}")
        return self.seen[nprobe, budget]

    def params(self, nprobe: int, budget: int | None) -> SearchParams:
        """The settings of one search; the index's own cap is lifted."""
        limits: dict[str, Any] = {} if self.index.max_codes is None else {"max_codes": 0}
        if budget is not None and self.budget is not None:
            limits[self.budget] = budget
        return SearchParams(nprobe=nprobe, **limits)

    def _exact(self) -> Tensor:
        self._say("ground truth")
        return self.index.search(self.queries, self.k, params=self.params(self.index.nlist, None))[1]

    def _checked(self, truth: Tensor) -> Tensor:
        if not isinstance(truth, Tensor) or truth.dtype != torch.int64:
            came = truth.dtype if isinstance(truth, Tensor) else type(truth).__name__
            raise TypeError(f"ground_truth must be an int64 torch.Tensor, got {came}")
        if truth.dim() != 2 or truth.shape[0] != self.queries.shape[0] or truth.shape[1] < self.k:
            wanted = f"({self.queries.shape[0]}, {self.k} or more)"
            raise ValueError(f"ground_truth must have shape {wanted}, got {tuple(truth.shape)}")
        return truth[:, : self.k].to(self.queries.device)

    def _say(self, what: str) -> None:
        if self.bar is not None:
            self.bar.set_postfix_str(what)
            self.bar.update()


def recall(ids: Tensor, truth: Tensor) -> float:
    """The share of true neighbours (Q, T) that are among the ids (Q, k); -1 is nothing, 1.0 where there are none.

    >>> recall(torch.tensor([[4, 2, -1]]), torch.tensor([[2, 7]]))
    0.5
    """
    true = truth != -1
    found = torch.stack([(column[:, None] == ids).any(1) for column in truth.t()], 1) & true
    return int(found.sum()) / int(true.sum()) if bool(true.any()) else 1.0


def _least(most: int, reaches: Callable[[int], bool]) -> int:
    """The least value in ``1 ... most`` that reaches, where all above it do too; `most` if none below it does.

    Doubling first keeps away from values that are much larger than needed, and take as much longer.
    """
    low = high = 1
    while high < most and not reaches(high):
        low, high = high + 1, min(2 * high, most)
    while low < high:
        middle = (low + high) // 2
        if reaches(middle):
            high = middle
        else:
            low = middle + 1
    return low
