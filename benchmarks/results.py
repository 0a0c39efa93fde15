"""The stored lines: `run` with the facts of a run, then `row`, `skip`, `failed` and `done`, which name it."""

import json
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from . import device

DEFAULT = Path(__file__).resolve().parent / "benchmarks.jsonl"
QUICK = DEFAULT.with_name("quick.jsonl")

Row = dict[str, Any]


@dataclass
class TaskRun:
    """One task on one case in one run."""

    case: str
    task: str
    facts: Row  # of the run: machine, threads, versions, commit, command
    rows: list[Row] = field(default_factory=list)
    skips: list[Row] = field(default_factory=list)
    seconds: float | None = None  # of the whole task, once it is done

    def engines(self) -> list[str]:
        return list(dict.fromkeys(row["engine"] for row in self.rows))

    def values(self, name: str) -> list[Any]:
        """The distinct values of a field, sorted."""
        return sorted({row[name] for row in self.rows if row.get(name) is not None})

    def pick(self, **wanted: Any) -> list[Row]:
        return [row for row in self.rows if all(row.get(key) == value for key, value in wanted.items())]


Tasks = Mapping[tuple[str, str], TaskRun]  # by case and task


def name(facts: Row) -> str:
    """The name of a run that starts now."""
    return f"{re.sub('[^0-9]', '', facts['date'])[:14]}-{facts['commit'][:7]}-{os.getpid()}"


def append(path: Path, line: Row) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")


def history(paths: Iterable[Path]) -> list[TaskRun]:
    """Every finished task, oldest first. Tasks that an interrupted run did not finish are left out."""
    runs: dict[str, Row] = {}
    tasks: dict[tuple[str, str, str], TaskRun] = {}
    texts = [text for path in paths if path.exists() for text in path.read_text(encoding="utf-8").splitlines() if text]
    for line in map(json.loads, texts):
        if line["kind"] == "run":
            runs[line["run"]] = line
        else:
            key = (line["run"], line["case"], line["task"])
            task = tasks.setdefault(key, TaskRun(line["case"], line["task"], runs[line["run"]]))
            if line["kind"] == "done":
                task.seconds = line["seconds"]
            elif line["kind"] in ("row", "skip"):
                getattr(task, line["kind"] + "s").append(line)
    return sorted((task for task in tasks.values() if task.seconds is not None), key=lambda task: task.facts["date"])


def latest(paths: Iterable[Path], kind: str | None = None) -> dict[tuple[str, str], TaskRun]:
    """The last finished run of each (case, task), without those over other values than the case's own.

    `kind`, if given, is the kind of device.
    """
    own = (task for task in history(paths) if not task.facts.get("values"))
    return {(task.case, task.task): task for task in own if kind in (None, device.kind(task.facts))}
