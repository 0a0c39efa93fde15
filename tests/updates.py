"""Searches and changes of one index at the same time, in which every answer can be checked.

Each writer owns some groups of rows, which it only ever changes in one call: it replaces all vectors of a group by
others with a new number, removes the group, or adds it again. A search of one query near each row of a group finds all
rows of the group with the same number, or none. The number must be that of a call that had begun when the search ended
and not yet been followed by another when it began. d dim, m rows of a group.
"""

from __future__ import annotations

import random
import threading
from typing import Any

import torch
from torch import Tensor

from torch_ivf_module import SearchParams

ROWS = 6  # of a group
NUMBERS = 8  # a group has one of so many numbers, in steps of 1 / 8 of the last dimension; positions are farther apart
ABSENT = -1
FAR = 30.0  # the shift of rows that belong to no group, which no query is near
PARAMS = (None, SearchParams(max_codes=1 << 40), SearchParams(selector=torch.arange(-1000, -1)), None)


def number_at(step: int) -> int:
    """The number of a group after its change number `step`: every fourth removes it."""
    return ABSENT if step % 4 == 3 else step % NUMBERS


class Group:
    """The rows of one group: ids (m,), positions (m, d), and which of its changes have begun and are done."""

    def __init__(self, number: int, d: int, generator: torch.Generator) -> None:
        self.ids = -2 - number * ROWS - torch.arange(ROWS)
        self.positions = 3 * torch.randn(ROWS, d, generator=generator)
        self.positions[:, -1] = 0
        self.begun = self.done = 0

    def vectors(self, step: int) -> Tensor:
        """The vectors (m, d) after change `step`."""
        vectors = self.positions.clone()
        vectors[:, -1] = number_at(step) / NUMBERS
        return vectors


class Workload:
    """Groups and filler in an index that probes all its lists; `writers` threads call `write`, others `read`.

    Each writer also adds `batch` rows of filler now and then, and removes the oldest at `filler` rows.
    """

    def __init__(self, index: Any, writers: int, *, groups: int = 4, batch: int = 50, filler: int = 600) -> None:
        self.index, self.batch, self.most = index, batch, filler // batch
        generator = torch.Generator().manual_seed(0)
        made = [Group(number, index.d, generator) for number in range(writers * groups)]
        self.groups = [made[writer::writers] for writer in range(writers)]  # of each writer
        self.filler: list[list[Tensor]] = [[] for _ in range(writers)]  # the ids of the batches of each writer
        index.train(torch.cat([3 * torch.randn(9000, index.d, generator=generator), self.far(9000, generator)]))
        for group in made:
            index.add_with_ids(group.vectors(0), group.ids)
        self.next_id = [1 + writer << 40 for writer in range(writers)]

    def far(self, count: int, generator: torch.Generator) -> Tensor:
        """Filler (count, d)."""
        rows = torch.randn(count, self.index.d, generator=generator)
        rows[:, 0] += FAR
        return rows

    def write(self, writer: int, chance: random.Random) -> str:
        """One change by this writer, which a search by the same thread must see; the name of the method."""
        if chance.random() < 0.3:
            return self.fill(writer, chance)
        group = chance.choice(self.groups[writer])
        step = group.done + 1
        group.begun = step
        before, after = number_at(step - 1), number_at(step)
        if before == ABSENT:
            name = "add"
            self.index.add_with_ids(group.vectors(step), group.ids)
        elif after == ABSENT:
            name = "remove"
            assert self.index.remove_ids(group.ids) == ROWS
        else:
            name = "update"
            self.index.update(group.ids, group.vectors(step))
        group.done = step
        return name

    def fill(self, writer: int, chance: random.Random) -> str:
        """A change of the filler of this writer."""
        batches = self.filler[writer]
        if len(batches) >= self.most:
            assert self.index.remove_ids(batches.pop(0)) == self.batch
            return "remove"
        ids = torch.arange(self.next_id[writer], self.next_id[writer] + self.batch)
        self.next_id[writer] += self.batch
        rows = self.far(self.batch, torch.Generator().manual_seed(chance.getrandbits(32)))
        self.index.add_with_ids(rows, ids)
        batches.append(ids)
        return "add"

    def read(self, group: Group, params: SearchParams | None = None) -> int:
        """Search the rows of a group, and check the answer: the number that was found."""
        earliest = group.done
        found, ids, vectors = self.index.search_and_reconstruct(group.positions, 1, params=params)
        latest = group.begun
        number = check_group(group, found[:, 0], ids[:, 0], vectors[:, 0])
        allowed = {number_at(step) for step in range(earliest, latest + 1)}
        assert number in allowed, f"number {number} of a group that had {allowed}"
        return number


def check_group(group: Group, found: Tensor, ids: Tensor, vectors: Tensor) -> int:
    """The number of a group in the answer of one query for each of its rows; AssertionError if it is none version's."""
    present = torch.isin(ids, group.ids)
    assert bool(present.all() | ~present.any()), f"rows {present.nonzero()[:, 0].tolist()} of a group alone: {ids}"
    filled = ids != -1
    exact = (group.positions - vectors).square().sum(1)[filled]
    assert torch.allclose(found[filled], exact, rtol=1e-4, atol=1e-4), f"D {found[filled]} of vectors at {exact}"
    if not present.any():
        return ABSENT
    assert torch.equal(ids, group.ids), f"the rows of the group are {group.ids}, found {ids}"
    numbers = (vectors[:, -1] * NUMBERS).round().long().unique()
    assert numbers.shape == (1,), f"rows of several updates: {numbers.tolist()}"
    return int(numbers)


class Until:
    """Runs `work` in threads until all that are counted have ended or one has failed."""

    def __init__(self) -> None:
        self.ended = threading.Event()
        self.errors: list[BaseException] = []

    def start(self, work: Any, *arguments: Any) -> threading.Thread:
        """A thread that runs `work(*arguments)`; its error ends all others."""

        def run() -> None:
            try:
                work(*arguments)
            except BaseException as error:
                self.errors.append(error)
                self.ended.set()

        thread = threading.Thread(target=run, daemon=True)
        thread.start()
        return thread
