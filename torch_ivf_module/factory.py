"""Indexes by the names that faiss's index_factory gives them."""

from __future__ import annotations

import re
from typing import Any

import torch

from .index import IndexFlat, IndexIVFFlat, IndexIVFScalarQuantizer, IndexPreTransform, IndexScalarQuantizer
from .index.base import IndexBase
from .index.pre_transform import Normalize

__all__ = ["index_factory"]

WORKS = "Flat, SQ8, SQ4, SQfp16 and SQbf16, alone or after IVFn as in 'IVF512,SQ8', with L2norm before them"
_ROWS: dict[str, dict[str, Any]] = {
    "Flat": {},
    "SQ8": {"bits": 8},
    "SQ4": {"bits": 4},
    "SQfp16": {"dtype": torch.float16},
    "SQbf16": {"dtype": torch.bfloat16},
}


def index_factory(
    d: int, description: str, metric: str = "l2", **settings: Any
) -> IndexBase | IndexPreTransform:
    """Create an empty index from a string of faiss's index_factory.

    Parameters
    ----------
    d : dimension of the vectors.
    description : parts separated by commas: optionally L2norm; optionally IVFn for n lists; and the storage of
        vectors: Flat (float32), SQfp16, SQbf16, SQ8 or SQ4. L2norm with metric "ip" gives metric "cosine".
    metric : "l2", "ip" or "cosine".
    settings : further arguments of the constructor, such as `nprobe`, `k` and `device`.

    Raises ValueError for other strings. For trained transforms such as PCA and OPQ use `IndexPreTransform` or
    `faiss_compat.index_factory`.

    >>> index_factory(64, "IVF16,SQ8", nprobe=4)
    IndexIVFScalarQuantizer(64, metric='l2', k=10, search_mode='auto', bits=8, nlist=16, nprobe=4, max_codes=None, \
list_ordering='none', ntotal=0, dtype=torch.float32, device=cpu)
    """
    if not isinstance(description, str):
        raise TypeError(f"description must be a string such as 'IVF512,Flat', got {type(description).__name__}")
    *before, rows = description.split(",")
    lists = re.fullmatch(r"IVF(\d+)", before[-1]) if before else None
    before = before[:-1] if lists else before
    if rows not in _ROWS or any(part != "L2norm" for part in before):
        raise ValueError(f"description must be one of {WORKS}; got {description!r}")
    if before and metric == "ip":
        before, metric = [], "cosine"
    settings = {"metric": metric, **_ROWS[rows], **settings}
    kinds = (IndexIVFFlat, IndexIVFScalarQuantizer) if lists else (IndexFlat, IndexScalarQuantizer)
    if lists:
        settings["nlist"] = int(lists[1])
    index: IndexBase = kinds["bits" in settings](d, **settings)
    return IndexPreTransform(d, Normalize(), index) if before else index
