"""Arrays and tensors at the surface: what callers pass as a tensor, results in the kind that they passed.

n rows, d dim.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NoReturn

import numpy
import torch
from torch import Tensor

from .._arrays import as_tensor

FLOAT_MAX = torch.finfo(torch.float32).max
Float32, Float16, UInt8, Int8 = 0, 1, 2, 3  # faiss's NumericType
_default = {"tensors": False}  # what methods without an array argument return; see `use_tensors`


class Unsupported(AttributeError, NotImplementedError):
    """A part of faiss that is not here; the text says what is. Both `hasattr` and ``except RuntimeError`` see it."""


def lacking(owner: object, name: str) -> Unsupported:
    """The error for an attribute that an object does not have; it lists those that it has."""
    known = sorted(each for each in {*dir(type(owner)), *vars(owner)} if not each.startswith("_"))
    return Unsupported(f"faiss_compat's {type(owner).__name__} has no attribute {name!r}; it has {', '.join(known)}")


def missing(self: object, name: str) -> NoReturn:
    """`__getattr__` of a class whose lack of an attribute of faiss is `Unsupported`."""
    if name.startswith("_") or hasattr(type(self), name):
        object.__getattribute__(self, name)  # raises once more what a property raised, or that there is no such name
    raise lacking(self, name)


@contextmanager
def faiss_errors() -> Iterator[None]:
    """Errors of the index as faiss's Python module raises those of its C++ code: as RuntimeError."""
    try:
        yield
    except (KeyError, ValueError, TypeError) as error:
        raise RuntimeError(str(error.args[0]) if error.args else str(error)) from error


def device_of(x: object) -> torch.device:
    """Where a tensor is; the CPU for an array."""
    return x.device if isinstance(x, Tensor) else torch.device("cpu")


def rows(x: object, d: int, device: torch.device, name: str = "x") -> Tensor:
    """Vectors x (n, d) as a float tensor without a gradient on `device`; arrays are converted to float32.

    AssertionError for another shape, or a tensor of a GPU that the index is not on, as in faiss.
    """
    if isinstance(x, Tensor):
        if x.device.type != "cpu" and x.device != device:
            raise AssertionError(f"{name} is on {x.device}, but the index is on {device}")
        found = x.detach().to(device)
    else:
        found = as_tensor(numpy.ascontiguousarray(x, dtype="float32"), name).to(device)
    if found.dim() != 2 or found.shape[1] != d:
        raise AssertionError(f"{name} must have shape (n, {d}), got {tuple(found.shape)}")
    return found


def numbers(ids: object, device: torch.device, n: int | None = None) -> Tensor:
    """Ids (n,) as int64. AssertionError for another shape, as in faiss."""
    found = ids if isinstance(ids, Tensor) else as_tensor(numpy.ascontiguousarray(ids, dtype="int64"), "ids")
    if found.dim() != 1 or (n is not None and found.shape[0] != n):
        raise AssertionError(f"ids must have shape ({'n' if n is None else n},), got {tuple(found.shape)}")
    return found.detach().long().to(device)


def returned(found: Tensor, given: object, out: Any = None) -> Any:
    """`found` as a tensor where the tensor `given` is, or as an array if `given` is none; or written into `out`.

    AssertionError for an `out` of another shape, as in faiss.
    """
    if out is None:
        return found.to(given.device) if isinstance(given, Tensor) else found.cpu().numpy()
    if tuple(out.shape) != tuple(found.shape):
        raise AssertionError(f"the output must have shape {tuple(found.shape)}, got {tuple(out.shape)}")
    if isinstance(out, Tensor):
        return out.copy_(found)
    numpy.copyto(out, found.cpu().numpy(), casting="same_kind")
    return out


def returned_rows(found: Tensor, keys: object, out: Any) -> Any:
    """`returned` for `reconstruct` and the like, whose kind follows `out`, then the keys, then `use_tensors`."""
    wanted = isinstance(keys, Tensor) or (_default["tensors"] and not isinstance(keys, numpy.ndarray))
    return returned(found.float(), found if wanted else None, out)


def use_tensors(value: bool) -> None:
    """Whether methods that take no array return tensors. ``import faiss.contrib.torch_utils`` asks for that."""
    _default["tensors"] = value


def padded(D: Tensor, I: Tensor) -> Tensor:
    """D with faiss's padding: the largest float of either sign where I is -1, instead of an infinity."""
    return torch.where(I < 0, D.clamp(-FLOAT_MAX, FLOAT_MAX), D)
