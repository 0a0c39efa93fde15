"""The kinds of measurement; a task writes rows through its context and returns nothing."""

from collections.abc import Callable

from ..context import Context
from .build import add, maintenance, train
from .filters import query_filters
from .formats import compiled, formats
from .memory import memory
from .params import auto, budgets, codes, filters
from .profile import profile
from .recall import pairs, quantizers, recall
from .search import flat, lists, search
from .serving import contention, serving
from .updates import updates

_SEARCHES = (lists, search, flat, recall, pairs, quantizers, auto, budgets, codes, filters, serving, contention)
_OTHERS = (query_filters, train, add, maintenance, updates, compiled, memory, formats, profile)
TASKS: dict[str, Callable[[Context], None]] = {task.__name__: task for task in (*_SEARCHES, *_OTHERS)}
