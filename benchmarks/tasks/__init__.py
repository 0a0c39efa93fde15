"""The kinds of measurement, one file each; a task writes rows through its context and returns nothing."""

from __future__ import annotations

from collections.abc import Callable

from ..context import Context
from . import auto, build, flat, formats, lists, maintenance, memory, params, profile, recall, search, threads

__all__ = ["TASKS"]

TASKS: dict[str, Callable[[Context], None]] = {
    "lists": lists.run,
    "search": search.run,
    "flat": flat.run,
    "train": build.train,
    "add": build.add,
    "recall": recall.run,
    "pairs": recall.pairs,
    "auto": auto.run,
    "budgets": params.budgets,
    "codes": params.codes,
    "filters": params.filters,
    "maintenance": maintenance.run,
    "threads": threads.run,
    "memory": memory.run,
    "formats": formats.run,
    "profile": profile.run,
}
