"""Names, shapes and dtypes of the buffers of an index, and whether a state is consistent.

N vectors, L lists, d dim.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

NAMES = ("centroids", "packed_embeddings", "list_offsets", "list_ids")
NEXT_ID = "next_id"
SAVED = (*NAMES, NEXT_ID)  # the entries of a state_dict
FLOATS = ("centroids", "packed_embeddings")
INTEGERS = ("list_offsets", "list_ids", NEXT_ID)
LAST_ID = 2**63 - 1
STORAGE = (torch.float32, torch.float16, torch.bfloat16)  # dtypes of packed_embeddings


def empty(
    d: int, *, flat: bool, device: torch.device | str | None = None, dtype: torch.dtype | None = None
) -> dict[str, Tensor]:
    """The buffers of an untrained index without vectors; `dtype` is that of the vectors."""
    return {
        "centroids": torch.empty(0, d, dtype=torch.float32, device=device),
        "packed_embeddings": torch.empty(0, d, dtype=dtype, device=device),
        "list_offsets": torch.zeros(2 if flat else 0, dtype=torch.int64, device=device),
        "list_ids": torch.empty(0, dtype=torch.int64, device=device),
        NEXT_ID: torch.zeros((), dtype=torch.int64, device=device),
    }


def misfit(state: Mapping[str, Tensor], d: int, *, flat: bool) -> str | None:
    """Why the tensors NAMES, and next_id if given, are not the buffers of an index of dimension `d`; None if they are.

    A flat index has one list and no centroid. The values of tensors on the meta device are not checked.
    """
    meta = any(state[name].is_meta for name in NAMES)
    return misfit_shapes(state, d, flat) or (None if meta else _misfit_values(state))


def misfit_shapes(state: Mapping[str, Tensor], d: int, flat: bool) -> str | None:
    """`misfit` of shapes and dtypes; no values are read."""
    centroids, packed, offsets, ids = (state[name] for name in NAMES)
    for name, tensor in (("centroids", centroids), ("packed_embeddings", packed)):
        if tensor.dim() != 2 or tensor.shape[1] != d:
            return f"{name} must have shape (n, {d}), got {tuple(tensor.shape)}"
        if not tensor.is_floating_point():
            return f"{name} must hold floats, got {tensor.dtype}"
    for name, tensor in (("list_offsets", offsets), ("list_ids", ids)):
        if tensor.dtype != torch.int64 or tensor.dim() != 1:
            return f"{name} must be int64 of shape (n,), got {tensor.dtype} {tuple(tensor.shape)}"
    if ids.shape[0] != packed.shape[0]:
        return f"list_ids has {ids.shape[0]} entries for {packed.shape[0]} rows of packed_embeddings"
    if NEXT_ID in state and (state[NEXT_ID].dtype != torch.int64 or state[NEXT_ID].dim() != 0):
        return f"next_id must be an int64 scalar, got {state[NEXT_ID].dtype} {tuple(state[NEXT_ID].shape)}"
    trained = 0 if flat else centroids.shape[0]
    if flat and centroids.shape[0]:
        return f"a flat index has no centroids, got {centroids.shape[0]}"
    expected = 2 if flat else trained + 1 if trained else 0
    if offsets.shape[0] != expected:
        return f"list_offsets must have {expected} entries for {trained} centroids, got {offsets.shape[0]}"
    if packed.shape[0] and not expected:
        return f"packed_embeddings has {packed.shape[0]} rows, but there are no centroids"
    return None


def _misfit_values(state: Mapping[str, Tensor]) -> str | None:
    wrong = misfit_offsets(state["list_offsets"], state["packed_embeddings"].shape[0])
    if wrong:
        return wrong
    if bool((state["list_ids"] == -1).any()):
        return "list_ids holds -1, which marks missing results"
    if not bool(torch.isfinite(state["centroids"].sum())) and not bool(torch.isfinite(state["centroids"]).all()):
        return "centroids hold NaN or inf"
    if NEXT_ID in state and int(state[NEXT_ID]) < 0:
        return f"next_id must be >= 0, got {int(state[NEXT_ID])}"
    return None


def misfit_offsets(offsets: Tensor, rows: int) -> str | None:
    """Why offsets (L + 1,) do not divide `rows` rows into lists, or None if they do."""
    if offsets.shape[0] and not offsets.is_meta:
        if int(offsets[0]) != 0 or int(offsets[-1]) != rows:
            return f"list_offsets must run from 0 to {rows}, got {int(offsets[0])} to {int(offsets[-1])}"
        falls = torch.nonzero(offsets[1:] < offsets[:-1])
        if falls.shape[0]:
            return f"list_offsets must not fall, but does behind entry {int(falls[0])}"
    return None


def next_id_after(ids: Tensor) -> int:
    """The `next_id` of an index with these ids, if it is not known: the largest + 1."""
    return max(0, min(int(ids.max()), LAST_ID - 1) + 1) if ids.shape[0] else 0
