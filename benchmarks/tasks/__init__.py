"""The kinds of measurement; a task writes rows through its context and returns nothing."""

from collections.abc import Callable

from ..context import Context
from .build import add, maintenance, train
from .formats import compiled, formats
from .memory import memory
from .params import auto, budgets, codes, filters
from .profile import profile
from .recall import pairs, quantizers, recall
from .search import flat, lists, search
from .serving import contention, serving

_FUNCTIONS = (lists, search, flat, train, add, recall, pairs, auto, budgets, codes, filters, maintenance)
_MORE = (quantizers, serving, contention, compiled, memory, formats, profile)
TASKS: dict[str, Callable[[Context], None]] = {task.__name__: task for task in (*_FUNCTIONS, *_MORE)}
