"""What every task is given, and how it reports: rows of figures, and engines that were skipped.

A task calls `build_paired` or `make` for its engines, `caller` and `time` to time them, `row` and `skip` to report.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from . import answers, device, engines
from .cases import Case
from .datasets import Data, load
from .measure import Effort, Timing, interleave, rotation


@dataclass
class Context:
    case: Case
    task: str
    names: tuple[str, ...]  # the engines that may take part
    effort: Effort
    threads: int
    write: Callable[[dict[str, Any]], None]  # appends one line
    note: Callable[[str], None]  # shows what is being done now

    def __post_init__(self) -> None:
        self.note("data")
        self.data: Data = load(self.case)
        self.train_rows = self.data.base[: self.case.train_rows]
        self.checked = self.data.queries[: self.case.truth_queries]  # the queries whose true neighbours are known

    @cached_property
    def truth(self) -> np.ndarray:
        self.note("brute force")
        return answers.brute_force(self.data.base, self.checked, self.case.k, self.case.metric)

    def spec(self, seed: int | None = None) -> engines.Spec:
        seed = self.case.seed if seed is None else seed
        d = self.data.base.shape[1]
        return engines.Spec(d, self.case.nlist, self.case.metric, seed, self.threads, device=device.name)

    def make(self, table: Mapping[str, engines.Entry], *only: str) -> dict[str, engines.Variant]:
        """Empty engines of `table` among the names that take part (and among `only`, if given)."""
        return engines.make([name for name in self.names if not only or name in only], table, self.spec())

    def build_paired(self, *only: str, table: Mapping[str, engines.Entry] = engines.IVF) -> dict[str, engines.Variant]:
        """List-based engines that hold the whole base, on the same centroids, with the case's nprobe, and warm."""
        made = self.make(table, *only)
        self.note("building " + ", ".join(made))
        engines.build_paired(made, self.train_rows, self.data.base, self.data.centroids)
        for engine in made.values():
            engine.set(self.case.nprobe)
            engine.warm(engine.convert(self.data.queries[:64]))
        return made

    def caller(self, engine: engines.Variant, rows: Any, nq: int) -> Callable[[int], Any]:
        """Call i searches the i-th slice of `nq` of the converted `rows`."""
        parts, search, k = rotation(rows, nq), engine.search, self.case.k
        return lambda i: search(parts[i % len(parts)], k)

    def time(
        self, calls: Mapping[str, Callable[[int], Any]], nq: int, facts: Mapping[str, Any] | None = None, **fields: Any
    ) -> dict[str, Timing]:
        """Time searches of `nq` queries in turns and write a row for each, with its own `facts` and common fields."""
        timings = interleave(calls, self.effort)
        for name, timing in timings.items():
            speed = {"nq": nq, "k": self.case.k, "qps": nq / timing["seconds"], **timing}
            self.row(name, **fields, **(facts or {}).get(name, {}), **speed)
        return timings

    def row(self, engine: str, **fields: Any) -> None:
        self.line("row", engine=engine, **fields)

    def skip(self, engine: str, reason: str, **fields: Any) -> None:
        self.note(f"{engine} skipped: {reason}")
        self.line("skip", engine=engine, reason=reason, **fields)

    def attempt(self, engine: str, call: Callable[..., Any], *arguments: Any, **fields: Any) -> Any:
        """The result of `call`; None if it fails, which skips the engine."""
        try:
            return call(*arguments)
        except Exception as error:
            self.skip(engine, f"{type(error).__name__}: {str(error).splitlines()[0][:200]}", **fields)

    def line(self, kind: str, **fields: Any) -> None:
        self.write({"kind": kind, "task": self.task, "case": self.case.name, **fields})
