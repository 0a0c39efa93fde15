"""Vectors and ids in files of every kind, read a piece at a time."""

from .arrays import BadData
from .ids import ids_file, open_ids, read_truth
from .kinds import KINDS
from .vectors import Vectors, open_vectors

__all__ = ["KINDS", "BadData", "Vectors", "ids_file", "open_ids", "open_vectors", "read_truth"]
