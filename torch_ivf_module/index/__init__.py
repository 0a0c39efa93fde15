"""The stateful indexes."""

from ..params import SearchParams
from .base import IndexBase
from .flat import IndexFlat, IndexFlatIP, IndexFlatL2
from .ivf import IndexIVF
from .ivf_flat import IndexIVFFlat
from .pre_transform import IndexPreTransform
from .scalar_quantizer import IndexIVFScalarQuantizer, IndexScalarQuantizer

__all__ = [
    "IndexBase",
    "IndexFlat",
    "IndexFlatIP",
    "IndexFlatL2",
    "IndexIVF",
    "IndexIVFFlat",
    "IndexIVFScalarQuantizer",
    "IndexPreTransform",
    "IndexScalarQuantizer",
    "SearchParams",
]
