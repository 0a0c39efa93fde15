"""Files that torch-ivf 0.1.1's `IndexIVFFlat.save` wrote.

Such a file is a plain dict: the index's own tensors and, beside them, its dimension, metric and settings.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ._arrays import finite_in_dtype
from .index import IndexIVFFlat, schema
from .index.row_format import FloatRows

_TENSORS = schema.names(FloatRows.name)
_MARK = {"d", "metric", "nlist", "packed_norms", *_TENSORS}


def is_state(about: Mapping[str, Any]) -> bool:
    """Whether a dict is what torch-ivf writes."""
    return set(about) >= _MARK


def from_state(about: Mapping[str, Any]) -> IndexIVFFlat:
    """The index that a dict written by torch-ivf describes. ValueError or TypeError if its parts do not fit."""
    given = {name: about[name] for name in _TENSORS}
    for name, tensor in given.items():
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name} must be a tensor, got {type(tensor).__name__}")
    if not given["centroids"].shape[0]:
        given["list_offsets"] = given["list_offsets"][:0]  # before training it has offsets already, all zero
    kept = given["packed_embeddings"].dtype
    index = IndexIVFFlat(
        int(about["d"]),
        nlist=int(about["nlist"]),
        nprobe=int(about.get("nprobe", 1)),
        metric=about["metric"],
        max_codes=int(about.get("max_codes", 0)),
        dtype=kept if kept != torch.float64 else torch.float32,
        device="meta",
    )
    index.load_state_dict(given, assign=True)
    finite_in_dtype(index.packed_embeddings, "packed_embeddings")
    return index
