"""The kinds of measurement, one file each; a task writes rows through its context and returns nothing."""

from __future__ import annotations

from collections.abc import Callable

from ..context import Context
from . import auto, build, flat, formats, maintenance, memory, params, recall, search, threads

__all__ = ["TASKS"]

TASKS: dict[str, Callable[[Context], None]] = {
    "search": search.run,
    "flat": flat.run,
    "train": build.train,
    "add": build.add,
    "recall": recall.run,
    "auto": auto.run,
    "budgets": params.budgets,
    "filters": params.filters,
    "maintenance": maintenance.run,
    "threads": threads.run,
    "memory": memory.run,
    "formats": formats.run,
}
