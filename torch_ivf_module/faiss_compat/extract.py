"""The inverted file within an index, and settings by name."""

from __future__ import annotations

from typing import Any

from .base import Index
from .id_map import IndexIDMap
from .ivf import IndexIVF
from .pre_transform import IndexPreTransform
from .transforms import VectorTransform

__all__ = [
    "ParameterSpace",
    "downcast_VectorTransform",
    "downcast_index",
    "extract_index_ivf",
    "try_extract_index_ivf",
]


def downcast_index(index: Index) -> Index:
    """The index itself: Python knows its class."""
    return index


def downcast_VectorTransform(transform: VectorTransform) -> VectorTransform:
    """The transform itself: Python knows its class."""
    return transform


def try_extract_index_ivf(index: Any) -> IndexIVF | None:
    """The inverted file within ID maps and transforms, None if there is none."""
    while isinstance(index, (IndexIDMap, IndexPreTransform)):
        index = index.index
    return index if isinstance(index, IndexIVF) else None


def extract_index_ivf(index: Any) -> IndexIVF:
    """The inverted file within ID maps and transforms. RuntimeError if there is none."""
    found = try_extract_index_ivf(index)
    if found is None:
        raise RuntimeError(f"{index!r} has no inverted file in it")
    return found


class ParameterSpace:
    """Sets `nprobe` and `max_codes` of the inverted file within an index, by name."""

    def initialize(self, index: Index) -> None:
        """Nothing: the settings do not depend on the index."""

    def set_index_parameter(self, index: Index, name: str, val: float) -> None:
        """Set one by its name. RuntimeError for another name, or an index without an inverted file."""
        ivf = try_extract_index_ivf(index)
        if ivf is None or name not in ("nprobe", "max_codes"):
            raise RuntimeError(f"could not set {name!r} of {index!r}; nprobe and max_codes of inverted files are known")
        setattr(ivf, name, int(val))

    def set_index_parameters(self, index: Index, param_string: str) -> None:
        """Set some, as in "nprobe=16,max_codes=1000"."""
        for part in filter(None, param_string.replace(" ", ",").split(",")):
            name, _, value = part.partition("=")
            self.set_index_parameter(index, name, float(value))
