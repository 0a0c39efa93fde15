"""Pure functions on tensors: the arithmetic of the index, without its state. Imports torch only."""

from .kmeans import kmeans
from .lists import InvertedLists
from .select import select_topk

__all__ = ["InvertedLists", "kmeans", "select_topk"]
