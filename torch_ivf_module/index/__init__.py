"""The stateful indexes."""

from ..params import SearchParams
from .base import IndexBase
from .flat import IndexFlat, IndexFlatIP, IndexFlatL2
from .ivf_flat import IndexIVFFlat
from .pre_transform import IndexPreTransform

__all__ = ["IndexBase", "IndexFlat", "IndexFlatIP", "IndexFlatL2", "IndexIVFFlat", "IndexPreTransform", "SearchParams"]
