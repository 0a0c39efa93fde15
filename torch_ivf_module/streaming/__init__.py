"""Indexes in files built from files of vectors, both of which may be larger than memory."""

from .arguments import Built
from .build import build_file
from .plan import DEFAULT_MEMORY

__all__ = ["DEFAULT_MEMORY", "Built", "build_file"]
