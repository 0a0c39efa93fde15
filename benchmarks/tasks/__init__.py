"""The kinds of measurement; a task writes rows through its context and returns nothing."""

from collections.abc import Callable

from ..context import Context
from . import build, formats, memory, params, profile, recall, search

TASKS: dict[str, Callable[[Context], None]] = {
    "lists": search.lists,
    "search": search.run,
    "flat": search.flat,
    "train": build.train,
    "add": build.add,
    "recall": recall.run,
    "pairs": recall.pairs,
    "auto": params.auto,
    "budgets": params.budgets,
    "codes": params.codes,
    "filters": params.filters,
    "maintenance": build.maintenance,
    "threads": search.threads,
    "memory": memory.run,
    "formats": formats.run,
    "profile": profile.run,
}
