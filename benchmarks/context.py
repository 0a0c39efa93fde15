"""What every task is handed, and the one way it reports."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from . import answers, engines
from .cases import Case
from .datasets import Data, load
from .measure import Effort

__all__ = ["Context"]


@dataclass
class Context:
    case: Case
    task: str
    names: tuple[str, ...]  # the engines that may take part
    effort: Effort
    threads: int
    write: Callable[[dict[str, Any]], None]  # appends one line
    note: Callable[[str], None]  # says what is being done now

    @cached_property
    def data(self) -> Data:
        self.note("data")
        return load(self.case)

    @property
    def train_rows(self) -> np.ndarray:
        return self.data.base[: self.case.train_rows]

    @property
    def checked(self) -> np.ndarray:
        """The queries whose true neighbours are known."""
        return self.data.queries[: self.case.truth_queries]

    @cached_property
    def truth(self) -> np.ndarray:
        self.note("brute force")
        return answers.brute_force(self.data.base, self.checked, self.case.k, self.case.metric)

    def spec(self, seed: int | None = None) -> engines.Spec:
        seed = self.case.seed if seed is None else seed
        return engines.Spec(self.data.base.shape[1], self.case.nlist, self.case.metric, seed, self.threads)

    def make(self, table: Mapping[str, engines.Entry], *only: str) -> dict[str, engines.Variant]:
        """Empty engines of `table` among the names that take part (and among `only`, if given)."""
        return engines.make([name for name in self.names if not only or name in only], table, self.spec())

    def build_paired(self, table: Mapping[str, engines.Entry], *only: str) -> dict[str, engines.Variant]:
        """List-based engines that hold the whole base, all on the same centroids."""
        made = self.make(table, *only)
        self.note("building " + ", ".join(engines.owners(made)))
        engines.paired(made, self.train_rows, self.data.base, self.data.centroids)
        return made

    def row(self, engine: str, **fields: Any) -> None:
        self._line("row", engine=engine, **fields)

    def skip(self, engine: str, reason: str, **fields: Any) -> None:
        self.note(f"{engine} skipped: {reason}")
        self._line("skip", engine=engine, reason=reason, **fields)

    def floor(self, **fields: Any) -> None:
        """What the machine does at the best, to set beside the rows of the task."""
        self._line("floor", **fields)

    def _line(self, kind: str, **fields: Any) -> None:
        self.write({"kind": kind, "task": self.task, "case": self.case.name, **fields})

    def first_of(self, names: Iterable[str]) -> str | None:
        """The engine the others' ids are compared with: faiss, or else whichever comes first."""
        present = list(names)
        return "faiss" if "faiss" in present else next(iter(present), None)
