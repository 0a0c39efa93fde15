"""Rules of the state machine that change the contents of the index."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import torch
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, precondition, rule
from torch import Tensor

from tests.fuzz.answers import lists_of
from tests.fuzz.filters import GROUPS, groups_of
from tests.fuzz.model import LAST_ID, Model
from tests.fuzz.vectors import GENTLE, KINDS, vectors
from tests.problems import few_training_rows

MOST_ROWS = 2_000
MOST_NUMBERS = 400_000  # N * d

SEEDS = st.integers(0, 2**16)
DATA = st.sampled_from(sorted(KINDS))
SIZES = st.one_of(st.integers(0, 12), st.integers(0, 60), st.sampled_from([0, 1, 300, 700]))
ID_STYLES = st.sampled_from(["fresh", "present", "repeated", "negative", "huge", "last"])
GROUPED = st.sampled_from([None, None, *GROUPS])
CHOICES = st.sampled_from(["some", "pending", "unknown", "none", "all", "mask", "one"])


def raises(error: type[Exception] | tuple[type[Exception], ...], call: Any, *arguments: Any) -> None:
    try:
        call(*arguments)
    except error:
        return
    raise AssertionError(f"{call} did not raise {error}")


class Changes(RuleBasedStateMachine):
    """Adding, removing, updating, merging, copying a subset, training."""

    index: Any
    model: Model
    gentle = True  # whether all data so far is such that faiss is accurate

    def room(self, size: int) -> int:
        most = min(MOST_ROWS, MOST_NUMBERS // self.model.d)
        return max(0, min(size, most - self.model.n))

    def rows(self, data: str, size: int, seed: int) -> Tensor:
        self.gentle &= data in GENTLE
        return vectors(data, size, self.model.d, seed, self.model.dtype)

    def some_ids(self, style: str, size: int, seed: int) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        numbers = torch.randint(0, 50, (size,), generator=generator)
        if style == "present" and self.model.n:
            return self.model.ids[numbers % self.model.n]
        if style == "fresh":
            return torch.arange(size) + self.model.next_id % 2**40 + int(numbers.sum())
        return {
            "repeated": numbers % 17,
            "negative": -2 - numbers,
            "huge": 2**62 + numbers,
            "last": LAST_ID - numbers,
        }.get(style, numbers)

    def chosen(self, choice: str, seed: int) -> tuple[Tensor, Tensor]:
        """An argument for remove_ids or copy_subset, and the rows of the model that it selects, bool (N,)."""
        generator, ids = torch.Generator().manual_seed(seed), self.model.ids
        if choice == "mask":
            mask = torch.rand(60, generator=generator) < 0.3
            known = (ids >= 0) & (ids < 60)
            return mask, known & mask[ids.where(known, torch.tensor(0))]
        given = {
            "some": lambda: ids[torch.rand(len(ids), generator=generator) < 0.3],
            "one": lambda: ids[torch.randperm(len(ids), generator=generator)[:1]],
            "pending": lambda: ids[len(ids) - self.last_added :],
            "unknown": lambda: torch.tensor([10**9 + 7, -9, -1]),
            "none": lambda: ids[:0],
            "all": lambda: ids,
        }[choice]()
        return given, torch.isin(ids, given)

    last_added = 0

    @rule(data=DATA, size=SIZES, seed=SEEDS, grouped=GROUPED)
    def add(self, data: str, size: int, seed: int, grouped: str | None = None) -> None:
        x = self.rows(data, self.room(size), seed)
        groups = groups_of(grouped, len(x), seed)
        if self.model.next_id + len(x) > LAST_ID:
            raises(RuntimeError, self.index.add, x)
            return
        self.index.add(x, groups=groups)
        self.model.add(x, torch.arange(self.model.next_id, self.model.next_id + len(x)), groups)
        self.model.next_id += len(x)
        self.last_added = len(x)

    @rule(data=DATA, size=SIZES, seed=SEEDS, style=ID_STYLES, grouped=GROUPED)
    def add_with_ids(self, data: str, size: int, seed: int, style: str, grouped: str | None = None) -> None:
        x = self.rows(data, self.room(size), seed)
        ids, groups = self.some_ids(style, len(x), seed), groups_of(grouped, len(x), seed)
        self.index.add_with_ids(x, ids, groups=groups)
        self.model.next_id = self.model.number_after(ids)
        self.model.add(x, ids, groups)
        self.last_added = len(x)

    @rule()
    def change_nothing(self) -> None:
        """Calls with zero rows, which must not affect later calls."""
        x, ids = torch.empty(0, self.model.d), torch.empty(0, dtype=torch.int64)
        self.index.add(x)
        self.index.add_with_ids(x, ids)
        self.index.update(ids, x)
        assert self.index.remove_ids(ids) == 0
        self.last_added = 0

    @rule(seed=SEEDS)
    def add_what_is_refused(self, seed: int) -> None:
        x = vectors("plain", 3, self.model.d, seed, self.model.dtype)
        bad = x.index_fill(0, torch.tensor([1]), torch.nan)
        raises((ValueError, RuntimeError), self.index.add, bad)  # the latter if no ids are left
        raises(ValueError, self.index.add_with_ids, bad, torch.arange(3))
        raises(ValueError, self.index.add_with_ids, x, torch.tensor([3, -1, 4]))
        raises(ValueError, self.index.add_with_ids, x, torch.arange(2))
        raises(KeyError, self.index.update, torch.tensor([10**9 + 7]), x[:1])
        if self.model.n:
            raises(ValueError, self.index.update, self.model.ids[:1], bad[1:2])

    @rule(choice=CHOICES, seed=SEEDS)
    def remove_ids(self, choice: str, seed: int) -> None:
        given, rows = self.chosen(choice, seed)
        assert self.index.remove_ids(given) == self.model.keep(~rows)

    @rule(choice=CHOICES, seed=SEEDS)
    def copy_subset(self, choice: str, seed: int) -> None:
        given, rows = self.chosen(choice, seed)
        self.index = self.index.copy_subset(given)
        self.model.keep(rows)

    @rule(data=DATA, choice=CHOICES.filter(lambda choice: choice != "mask"), seed=SEEDS, grouped=GROUPED)
    def update(self, data: str, choice: str, seed: int, grouped: str | None = None) -> None:
        ids = self.chosen(choice, seed)[0].unique()
        counts = (ids[:, None] == self.model.ids).sum(1)
        ids = ids[counts == 1]
        x, groups = self.rows(data, len(ids), seed), groups_of(grouped, len(ids), seed)
        self.index.update(ids, x, groups=groups)
        old, changed = self.model.ids.argsort(), torch.isin(self.model.ids, ids)
        groups = self.model.groups[old[changed[old]]] if groups is None else groups  # ids ascend
        self.model.keep(~changed)
        self.model.add(x, ids, groups)

    @rule()
    def reset(self) -> None:
        self.index.reset()
        self.model.keep(torch.zeros(self.model.n, dtype=torch.bool))
        self.model.next_id = 0
        self.model.unordered = set()

    @rule(
        data=DATA,
        size=SIZES,
        seed=SEEDS,
        style=ID_STYLES,
        add_id=st.sampled_from([0, 1, 1000, -7]),
        grouped=GROUPED,
    )
    def merge_from(
        self, data: str, size: int, seed: int, style: str, add_id: int, grouped: str | None = None
    ) -> None:
        other = self.index.copy_subset(torch.empty(0, dtype=torch.int64))
        other.reset()
        x = self.rows(data, self.room(size), seed)
        ids, groups = self.some_ids(style, len(x), seed), groups_of(grouped, len(x), seed)
        other.add_with_ids(x, ids, groups=groups)
        if any(not -(2**63) <= id + add_id <= LAST_ID or id + add_id == -1 for id in ids.tolist()):
            raises(ValueError, self.index.merge_from, other, add_id)
            return
        other_next = int(other.next_id)
        self.index.merge_from(other, add_id)
        assert other.ntotal == 0
        self.model.next_id = max(self.model.number_after(ids + add_id), min(other_next + add_id, LAST_ID))
        self.model.add(x, ids + add_id, groups)
        self.last_added = len(x)

    @precondition(lambda self: self.model.trainable)
    @rule(max_rows=st.sampled_from([1, 30, 1 << 16]), seed=SEEDS)
    def rebalance(self, max_rows: int, seed: int) -> None:
        """Some rows are in another list afterwards, which need not be the nearest."""
        report = self.index.rebalance(max_rows=max_rows, seed=seed)
        assert report.total == self.model.n
        copied = deepcopy(self.index)  # for reading the buffers packs what is pending
        self.model.centroids = copied.centroids.clone()
        assert self.model.centroids.isfinite().all()
        self.model.lists = lists_of(copied, self.model)

    def took_centroids(self) -> None:
        centroids = self.index.centroids.clone()
        assert centroids.dtype == torch.float32
        assert centroids.isfinite().all()
        self.model.centroids = centroids
        self.model.place_again()

    @precondition(lambda self: self.model.centroids is not None)
    @rule(data=DATA.filter(lambda data: data != "overflowing"), size=st.integers(20, 80), seed=SEEDS)
    def train(self, data: str, size: int, seed: int) -> None:
        with few_training_rows():
            self.index.train(self.rows(data, size, seed), niter=3)
        self.took_centroids()

    @precondition(lambda self: self.model.trainable)
    @rule()
    def retrain(self) -> None:
        with few_training_rows():
            report = self.index.retrain(niter=2)
        assert report.total == self.model.n
        self.took_centroids()

    @precondition(lambda self: self.model.centroids is not None)
    @rule()
    def rebuild_lists(self) -> None:
        if "list_groups" in deepcopy(self.index).state_dict():
            raises(RuntimeError, self.index.rebuild_lists)
            return
        assert (self.model.groups == -1).all()
        self.index.rebuild_lists()
