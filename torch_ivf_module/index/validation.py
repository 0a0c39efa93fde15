"""Checks of arguments. Each error names the argument, the value passed, and a value that would work.

N rows, d dim.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping

import torch
from torch import Tensor

from .. import _arrays
from .._arrays import RANGE, as_tensor, beyond_int64, word
from ..functional.transforms import wrapped
from .schema import LAST_ID

_IDS = (torch.int64, torch.int32, torch.uint32, torch.uint64)
_FIXED = ("d", "metric")  # attributes of an index on which its vectors and centroids depend


def unchanged(name: str, value: object, attributes: Mapping[str, object]) -> None:
    """AttributeError if `value` would change one of `attributes` that is fixed."""
    if name not in _FIXED or name not in attributes:
        return
    if type(value) is not type(attributes[name]) or value != attributes[name]:
        what = f"{name} cannot be changed from {attributes[name]!r}"
        raise AttributeError(f"{what}: make another index with {name}={value!r}")


def vectors(x: object, name: str, d: int, device: torch.device) -> Tensor:
    """`x` as a float tensor (N, d) on `device`, whatever its strides and its float dtype."""
    if type(x) is Tensor and x.dtype is torch.float32 and x.layout is torch.strided and not x.is_nested:
        usual = x.dim() == 2 and x.shape[1] == d and x.device == device
        if usual:  # the common case, checked without calls of Python functions
            return x
    tensor = floats(x, name, device)
    if tensor.dim() == 1:
        what = f"{name}[None] for one row" if tensor.numel() else f"torch.empty(0, {d}) for no rows"
        raise ValueError(f"{name} must have shape (n, {d}), got {tuple(tensor.shape)}; pass {what}")
    if tensor.dim() != 2 or tensor.shape[1] != d:
        raise ValueError(f"{name} must have shape (n, {d}), got {tuple(tensor.shape)}")
    return tensor


def layer_input(x: object, name: str, d: int, device: torch.device) -> Tensor:
    """`x` as a float tensor (..., d) on `device`."""
    tensor = floats(x, name, device)
    if tensor.dim() == 0 or tensor.shape[-1] != d:
        raise ValueError(f"{name} must have shape (..., {d}), got {tuple(tensor.shape)}")
    return tensor


def floats(x: object, name: str, device: torch.device) -> Tensor:
    """`x` as a tensor of floats on `device`."""
    return _placed(_arrays.floats(x, name), x, name, device)


def _placed(tensor: Tensor, given: object, name: str, device: torch.device) -> Tensor:
    """`tensor`, made of the argument `given`, on `device`: arrays and lists are moved, other tensors are refused."""
    if tensor.device == device:
        return tensor
    if isinstance(given, Tensor):
        where = f"{name} is on {tensor.device}, the index is on {device}"
        raise ValueError(f"{where}; move it with {name}.to('{device}')")
    return tensor.to(device)


def ids(value: object, name: str, rows: int, device: torch.device) -> Tensor:
    """`value` as int64 ids (rows,) on `device`."""
    found = id_list(value, name, device)
    if found.shape[0] != rows:
        raise ValueError(f"{name} must have one id for each of the {rows} rows of x, got {found.shape[0]}")
    if bool((found == -1).any()):
        at = int(torch.nonzero(found == -1)[0])
        raise ValueError(f"{name} may hold any int64 but -1, which marks missing results; {name}[{at}] is -1")
    return found


def groups(value: object, rows: int, device: torch.device) -> Tensor | None:
    """`value` as int64 groups (rows,) on `device`, a copy; None for None."""
    if value is None:
        return None
    found = id_list(value, "groups", device)
    if found.shape[0] != rows:
        raise ValueError(f"groups must have one group for each of the {rows} rows of x, got {found.shape[0]}")
    return found.clone()


def groups_of_queries(value: object, queries: int, device: torch.device) -> Tensor:
    """`value` as int64 groups (queries,) on `device`."""
    found = id_list(value, "groups", device)
    if found.shape[0] != queries:
        raise ValueError(f"groups must have one group for each of the {queries} queries, got {found.shape[0]}")
    return found


def numbering(first: int, rows: int) -> int:
    """next_id after `rows` rows with the ids from `first` on; RuntimeError if an id would exceed 2^63 - 2."""
    if first + rows > LAST_ID:
        raise RuntimeError(f"x has {rows} rows, but ids would pass 2^63 - 2 from next_id = {first}")
    return first + rows


def id_list(value: object, name: str, device: torch.device) -> Tensor:
    """`value` as a list of int64 ids on `device`, of any length."""
    return _int64s(value, name, device, 1, "(n,)")


def id_rows(value: object, name: str, queries: int, device: torch.device) -> Tensor:
    """`value` as int64 ids (queries, m) on `device`, for any m."""
    tensor = _int64s(value, name, device, 2, f"({queries}, m)")
    return _of_each(tensor, name, queries, f"({queries}, m)")


def _of_each(tensor: Tensor, name: str, queries: int, shape: str) -> Tensor:
    if tensor.shape[0] != queries:
        what = f"{name} must have a row for each of the {queries} queries, shape {shape}"
        raise ValueError(f"{what}, got {tuple(tensor.shape)}")
    return tensor


def _int64s(value: object, name: str, device: torch.device, dim: int, shape: str) -> Tensor:
    """`value` as int64 on `device`, with so many dimensions."""
    tensor = as_tensor(value, name)
    if tensor.dtype not in _IDS:
        if beyond_int64(value):
            raise ValueError(f"{name} holds an integer beyond the 64 bits of int64: {RANGE}")
        cast = f"{name}.long()" if isinstance(value, Tensor) else f"torch.as_tensor({name}).long()"
        what = "" if tensor.is_complex() else f"; cast it with {cast}"
        what += ", or a mask with .bool()" if tensor.dtype == torch.uint8 else ""
        raise TypeError(f"{name} must be int64 or int32, got {word(tensor.dtype)}{what}")
    if tensor.dim() != dim:
        one = f"{name}[None]" if isinstance(value, Tensor) else f"[{value}]"
        what = f"; pass {one} for one" if tensor.dim() == 0 and dim == 1 else ""
        what = f"; pass {name}[:, None] for one id per query" if tensor.dim() == 1 and dim == 2 else what
        raise ValueError(f"{name} must have shape {shape}, got {tuple(tensor.shape)}{what}")
    found = _plain(_placed(tensor, value, name, device), name).detach().long()
    if tensor.dtype == torch.uint64 and bool((found < 0).any()):
        raise ValueError(f"{name} must be below 2^63, got {int(found[found < 0][0]) + 2**64}")
    return found


def _plain(tensor: Tensor, name: str) -> Tensor:
    """`tensor`; ValueError if it belongs to a running torch.func transform."""
    if wrapped(tensor):
        raise ValueError(f"{name} is transformed by torch.func (vmap, grad, ...): only queries x may be")
    return tensor


def int64(value: object, name: str) -> int:
    """`value` as an int in the range of int64."""
    try:
        number = operator.index(value)  # type: ignore[arg-type]
    except TypeError:
        raise TypeError(f"{name} must be an int, got {type(value).__name__}") from None
    if not -(2**63) <= number < 2**63:
        raise ValueError(f"{name} must be an int of 64 bits, got {number}")
    return number


def mask(value: object, name: str, device: torch.device) -> Tensor:
    """`value` as a bool mask over ids on `device`, of any length."""
    tensor = as_tensor(value, name)
    if tensor.dtype != torch.bool:
        raise TypeError(f"{name} must be a bool mask, entry i for id i, got {word(tensor.dtype)}")
    if tensor.dim() != 1:
        raise ValueError(f"{name} as a mask must have shape (n,), got {tuple(tensor.shape)}")
    return _plain(_placed(tensor, value, name, device), name)


def layer_mask(value: object, name: str, shape: torch.Size, device: torch.device) -> Tensor:
    """`value` as a bool mask over ids on `device`, of any length: (n,), or (..., n) for queries of shape (...)."""
    tensor = as_tensor(value, name)
    if tensor.dim() <= 1 or tensor.dtype != torch.bool:
        return mask(value, name, device)
    return _layer_part(value, name, tensor, shape, "n", device)


def layer_ids(value: object, name: str, shape: torch.Size, count: int, device: torch.device) -> Tensor:
    """`value` as int64 ids (..., count) on `device`, for queries of shape (...)."""
    tensor = as_tensor(value, name)
    if tensor.dtype not in _IDS:
        raise TypeError(f"{name} must be int64 or int32, got {word(tensor.dtype)}")
    if tensor.dim() == 0 or tensor.shape[-1] != count:
        raise ValueError(f"{name} must have {count} columns, got shape {tuple(tensor.shape)}")
    return _layer_part(value, name, tensor, shape, str(count), device).long()


def _layer_part(
    value: object, name: str, tensor: Tensor, shape: torch.Size, last: str, device: torch.device
) -> Tensor:
    if tensor.shape[:-1] != shape:
        wanted = ", ".join([*map(str, shape), last])
        raise ValueError(f"{name} must have shape ({wanted}), got {tuple(tensor.shape)}")
    return _plain(_placed(tensor, value, name, device), name)


def query_masks(value: object, name: str, queries: int, device: torch.device) -> Tensor:
    """`value` as a bool mask over ids for each query (queries, n), on `device`."""
    tensor, shape = as_tensor(value, name), f"({queries}, n)"
    if tensor.dim() == 2 and tensor.dtype in _IDS:
        what = f"{name} must have shape (n,) as ids, got {tuple(tensor.shape)}"
        raise ValueError(f"{what}; ids for each query are a list of {queries} tensors")
    if tensor.dtype != torch.bool:
        raise TypeError(f"{name} must be bool masks over ids for each query, got {word(tensor.dtype)}")
    if tensor.dim() != 2:
        raise ValueError(f"{name} must have shape (n,) or {shape} as a mask, got {tuple(tensor.shape)}")
    return _of_each(_plain(_placed(tensor, value, name, device), name), name, queries, shape)


def selector(value: object, name: str, device: torch.device) -> Tensor:
    """`value` as a bool mask over ids, or as a list of int64 ids, on `device`."""
    if as_tensor(value, name).dtype == torch.bool:
        return mask(value, name, device)
    return id_list(value, name, device)


def radii(value: object, name: str, queries: int, device: torch.device) -> Tensor:
    """`value`, a number or a tensor of one for each query, as float32 (queries,) on `device`, none of them NaN."""
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    given = torch.tensor(value, dtype=torch.float64, device="cpu") if number else as_tensor(value, name)
    if given.dim() and given.shape != (queries,):
        raise ValueError(f"{name} must be a number or have shape ({queries},), got {tuple(given.shape)}")
    if given.dim():
        found = floats(value, name, device).detach().float()
    else:
        found = torch.full((queries,), float(given), dtype=torch.float32, device=device)
    if bool(found.isnan().any()):
        raise ValueError(f"{name} must be a number, got nan")
    return found
