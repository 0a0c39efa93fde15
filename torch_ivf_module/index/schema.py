"""Names, shapes and dtypes of the buffers of an index, and whether a state is consistent.

N vectors, L lists, d dim.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from .row_format import RowFormat

NEXT_ID = "next_id"
INTEGERS = ("list_offsets", "list_ids", NEXT_ID)
GROUPS = "list_groups"  # (N,) int64, only in an index with rows that have groups
LAST_ID = 2**63 - 1


def names(rows: str) -> tuple[str, str, str, str]:
    """The names of centroids, packed rows, offsets and ids; `rows`, that of the rows, depends on their format."""
    return "centroids", rows, "list_offsets", "list_ids"


def saved(rows: str) -> tuple[str, ...]:
    """The entries of a state_dict; GROUPS is in that of an index with groups alone."""
    return (*names(rows), NEXT_ID, GROUPS)


def integers(buffers: Mapping[str, Tensor]) -> tuple[str, ...]:
    """The names of the integer buffers that there are."""
    return (*INTEGERS, GROUPS) if GROUPS in buffers else INTEGERS


def empty(
    rows: RowFormat, *, flat: bool, device: torch.device | str | None = None, dtype: torch.dtype | None = None
) -> dict[str, Tensor]:
    """The buffers of an untrained index without vectors; `dtype` is that of the rows, by default that of the format."""
    return {
        "centroids": torch.empty(0, rows.d, dtype=torch.float32, device=device),
        rows.name: torch.empty(0, rows.width, dtype=dtype or rows.dtype, device=device),
        "list_offsets": torch.zeros(2 if flat else 0, dtype=torch.int64, device=device),
        "list_ids": torch.empty(0, dtype=torch.int64, device=device),
        NEXT_ID: torch.zeros((), dtype=torch.int64, device=device),
    }


def misfit(state: Mapping[str, Tensor], rows: RowFormat, *, flat: bool) -> str | None:
    """Why the tensors called `names`, and next_id if given, are not the buffers of an index whose rows have this
    format; None if they are.

    A flat index has one list and no centroid. The values of tensors on the meta device are not checked.
    """
    meta = any(state[name].is_meta for name in names(rows.name))
    return misfit_shapes(state, rows, flat) or (None if meta else _misfit_values(state, rows))


def misfit_shapes(state: Mapping[str, Tensor], rows: RowFormat, flat: bool) -> str | None:
    """`misfit` of shapes and dtypes; no values are read."""
    centroids, packed, offsets, ids = (state[name] for name in names(rows.name))
    if centroids.dim() != 2 or centroids.shape[1] != rows.d:
        return f"centroids must have shape (n, {rows.d}), got {tuple(centroids.shape)}"
    if not centroids.is_floating_point():
        return f"centroids must hold floats, got {centroids.dtype}"
    if wrong := rows.misfit(packed):
        return wrong
    for name, tensor in (("list_offsets", offsets), ("list_ids", ids)):
        if tensor.dtype != torch.int64 or tensor.dim() != 1:
            return f"{name} must be int64 of shape (n,), got {tensor.dtype} {tuple(tensor.shape)}"
    groups = state.get(GROUPS)
    if groups is not None and (groups.dtype != torch.int64 or groups.shape != ids.shape):
        return f"{GROUPS} must be int64 of shape {tuple(ids.shape)}, got {groups.dtype} {tuple(groups.shape)}"
    if ids.shape[0] != packed.shape[0]:
        return f"list_ids has {ids.shape[0]} entries for {packed.shape[0]} rows of {rows.name}"
    if NEXT_ID in state and (state[NEXT_ID].dtype != torch.int64 or state[NEXT_ID].dim() != 0):
        return f"next_id must be an int64 scalar, got {state[NEXT_ID].dtype} {tuple(state[NEXT_ID].shape)}"
    trained = 0 if flat else centroids.shape[0]
    if flat and centroids.shape[0]:
        return f"a flat index has no centroids, got {centroids.shape[0]}"
    expected = 2 if flat else trained + 1 if trained else 0
    if offsets.shape[0] != expected:
        return f"list_offsets must have {expected} entries for {trained} centroids, got {offsets.shape[0]}"
    if packed.shape[0] and not expected:
        return f"{rows.name} has {packed.shape[0]} rows, but there are no centroids"
    return None


def _misfit_values(state: Mapping[str, Tensor], rows: RowFormat) -> str | None:
    wrong = misfit_offsets(state["list_offsets"], state[rows.name].shape[0])
    if wrong:
        return wrong
    if bool((state["list_ids"] == -1).any()):
        return "list_ids holds -1, which marks missing results"
    if not bool(torch.isfinite(state["centroids"].sum())) and not bool(torch.isfinite(state["centroids"]).all()):
        return "centroids hold NaN or inf"
    if GROUPS in state and (unsorted := _misfit_groups(state["list_offsets"], state[GROUPS])):
        return unsorted
    if NEXT_ID in state and int(state[NEXT_ID]) < 0:
        return f"next_id must be >= 0, got {int(state[NEXT_ID])}"
    return None


def _misfit_groups(offsets: Tensor, groups: Tensor) -> str | None:
    """Why groups (N,) are not those of lists with valid offsets (L + 1,), or None if they are."""
    falls = torch.nonzero(groups[1:] < groups[:-1])[:, 0] + 1
    within = falls[~torch.isin(falls, offsets)]
    if within.shape[0]:
        return f"{GROUPS} must ascend within each list, but entry {int(within[0])} is less than the one before"
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
