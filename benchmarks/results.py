"""The stored lines: `run` with the facts of a run, then `row`, `skip`, `floor`, `failed` and `done`, which name it."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

__all__ = ["DEFAULT", "QUICK", "TaskRun", "append", "history", "latest"]

_FOLDER = Path(__file__).resolve().parent
DEFAULT = _FOLDER / "benchmarks.jsonl"
QUICK = _FOLDER / "quick.jsonl"


@dataclass
class TaskRun:
    """One task on one case in one run."""

    case: str
    task: str
    facts: dict[str, Any]  # of the run: machine, threads, versions, commit, command
    rows: list[dict[str, Any]] = field(default_factory=list)
    skips: list[dict[str, Any]] = field(default_factory=list)
    floors: list[dict[str, Any]] = field(default_factory=list)
    seconds: float | None = None  # that the whole took, once it is done

    def engines(self) -> list[str]:
        return list(dict.fromkeys(row["engine"] for row in self.rows))

    def values(self, name: str) -> list[Any]:
        """The distinct values of a field, in order."""
        return sorted({row[name] for row in self.rows if row.get(name) is not None})

    def pick(self, **wanted: Any) -> list[dict[str, Any]]:
        return [row for row in self.rows if all(row.get(key) == value for key, value in wanted.items())]

    def ratio(self, name: str, engine: str, other: str = "faiss", **wanted: Any) -> float | None:
        """`name` of `engine` over that of `other` in this very run; None where either is missing."""
        mine, theirs = self.pick(engine=engine, **wanted), self.pick(engine=other, **wanted)
        return mine[0][name] / theirs[0][name] if mine and theirs and theirs[0][name] else None


def append(path: Path, line: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")


def history(paths: Iterable[Path]) -> list[TaskRun]:
    """Every finished task, oldest first. What a broken run left unfinished is passed over."""
    runs: dict[str, dict[str, Any]] = {}
    tasks: dict[tuple[str, str, str], TaskRun] = {}
    for line in _lines(paths):
        if line["kind"] == "run":
            runs[line["run"]] = line
            continue
        key = (line["run"], line["case"], line["task"])
        task = tasks.setdefault(key, TaskRun(line["case"], line["task"], runs[line["run"]]))
        kept = {"row": task.rows, "skip": task.skips, "floor": task.floors}
        if line["kind"] == "done":
            task.seconds = line["seconds"]
        elif line["kind"] in kept:
            kept[line["kind"]].append(line)
    return sorted((task for task in tasks.values() if task.seconds is not None), key=lambda task: task.facts["date"])


def latest(paths: Iterable[Path]) -> dict[tuple[str, str], TaskRun]:
    """The last finished run of each (case, task), those with other values than the case's own left out."""
    return {(task.case, task.task): task for task in history(paths) if not task.facts.get("values")}


def _lines(paths: Iterable[Path]) -> Iterable[dict[str, Any]]:
    for path in paths:
        if path.exists():
            with path.open(encoding="utf-8") as file:
                yield from (json.loads(line) for line in file if line.strip())
