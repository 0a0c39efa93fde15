"""What callers pass for a tensor: arrays, memory maps, lists and ranges are taken, other layouts are refused.

N rows, d dim.
"""

from __future__ import annotations

from typing import Any

import numpy
import torch
from torch import Tensor

from ._torch_internals import MKLDNN_LAYOUT

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
RANGE = "-2^63 to 2^63 - 1"
_LAYOUTS = {
    torch.sparse_coo: "sparse",
    torch.sparse_csr: "sparse",
    torch.sparse_csc: "sparse",
    torch.sparse_bsr: "sparse",
    torch.sparse_bsc: "sparse",
    MKLDNN_LAYOUT: "in oneDNN's layout",
}


def as_tensor(value: object, name: str) -> Tensor:
    """`value` as a dense tensor: a tensor as it is, anything else as a CPU tensor that may share memory with it.

    numpy arrays (read-only and memory-mapped ones too), nested lists, ranges, and what has `__array__`. Nobody may
    write to the result. Raises TypeError for a tensor or array of another layout, naming the conversion.

    >>> as_tensor(range(3), "ids")
    tensor([0, 1, 2])
    """
    if isinstance(value, Tensor):
        _refuse_layouts(value, name)
        return value
    if isinstance(value, torch.fx.Proxy):
        raise TypeError(
            f"{name} is a torch.fx Proxy, but a search cannot be traced step by step: call the index as a layer, "
            "index(x), which is recorded as one call, or trace index.graph(...)"
        )
    if hasattr(value, "__cuda_array_interface__"):
        return torch.as_tensor(value)
    if hasattr(value, "toarray"):
        raise TypeError(f"{name} must be dense, got a sparse {type(value).__name__}; pass {name}.toarray()")
    if isinstance(value, (list, tuple)) and any(isinstance(item, Tensor) and item.dim() for item in value):
        raise TypeError(f"{name} must be one tensor, got a {type(value).__name__} of tensors; use torch.stack({name})")
    return _from_array(value, name)


def floats(value: object, name: str) -> Tensor:
    """`value` as a tensor of floats, as `as_tensor` makes it; of an empty list float32.

    >>> floats([], "x").dtype
    torch.float32
    """
    tensor = as_tensor(value, name)
    if tensor.dtype in FLOATS:
        return tensor
    if isinstance(value, (list, tuple)) and not tensor.numel():
        return tensor.float()
    cast = f"{name}.float()" if isinstance(value, Tensor) else f"torch.as_tensor({name}).float()"
    what = f"cast it with {cast}"
    if tensor.is_complex():
        what = f"complex vectors are not supported, but torch.view_as_real({name}).flatten(-2) is twice as many floats"
    raise TypeError(f"{name} must be float16, bfloat16, float32 or float64, got {word(tensor.dtype)}; {what}")


def finite(x: Tensor, name: str, what: str = "NaN or inf") -> None:
    """Refuse rows of x (N, d) with NaN or inf, naming the first."""
    # A sum is non-finite whenever an entry is, and a single fast pass; a finite sum settles it.
    if x.is_meta or bool(torch.isfinite(x.sum())):
        return
    bad = torch.nonzero(~torch.isfinite(x).all(1))
    if bad.shape[0]:
        row = int(bad[0])
        raise ValueError(f"{name} must be finite, but row {row} holds {what} ({bad.shape[0]} such rows in all)")


def finite_in_dtype(x: Tensor, name: str) -> None:
    """Refuse rows that were not finite, or are not since they were cast to the dtype they are in."""
    finite(x, name, f"NaN, inf or values beyond {torch.finfo(x.dtype).max:.4g}, the largest that {word(x.dtype)} holds")


def beyond_int64(value: object) -> bool:
    """Whether an int within these lists is none that int64 holds."""
    if isinstance(value, (list, tuple)):
        return any(map(beyond_int64, value))
    return isinstance(value, int) and not -(2**63) <= value < 2**63


def word(dtype: torch.dtype) -> str:
    """A dtype as messages call it."""
    return str(dtype).removeprefix("torch.")


def _refuse_layouts(x: Tensor, name: str) -> None:
    """TypeError for a tensor whose numbers do not lie in strided memory as they are."""
    if x.is_nested:
        raise TypeError(f"{name} must be a dense tensor, got a nested one; pass {name}.values() or to_padded_tensor(0)")
    if x.is_quantized:
        raise TypeError(f"{name} must be a dense float tensor, got a quantized one; pass {name}.dequantize()")
    if type(x).__name__ == "MaskedTensor":
        raise TypeError(f"{name} must be a dense tensor, got a MaskedTensor; pass {name}.to_tensor(0)")
    if x.layout is not torch.strided:
        kind = _LAYOUTS.get(x.layout, str(x.layout))
        raise TypeError(f"{name} must be a dense tensor, got one that is {kind} ({x.layout}); pass {name}.to_dense()")


def _from_array(value: object, name: str) -> Tensor:
    if isinstance(value, numpy.ma.MaskedArray):
        raise TypeError(f"{name} must be a dense array, got a masked one; pass {name}.filled(0)")
    try:
        array: Any = numpy.asarray(value)
    except ValueError as error:
        raise ValueError(f"{name} must have rows of one length: {error}") from None
    if array.dtype.kind not in "biufc" or (array.dtype.kind == "f" and array.dtype.itemsize > 8):
        if beyond_int64(array.tolist()):
            raise ValueError(f"{name} holds an integer beyond the 64 bits of int64: {RANGE}")
        came = f"an array of dtype {array.dtype}" if isinstance(value, numpy.ndarray) else type(value).__name__
        raise TypeError(f"{name} must be a torch.Tensor, a numpy array or a list of numbers, got {came}")
    if not array.dtype.isnative or any(stride < 0 for stride in array.strides):
        array = array.astype(array.dtype.newbyteorder("="), order="C")
    array = array.view(array.dtype.str)  # C has two types of 64 bits, of which torch knows one
    if not array.size and isinstance(value, (list, tuple)):
        return torch.empty(array.shape, dtype=torch.int64, device="cpu")
    return torch.from_numpy(array if array.flags.writeable else numpy.asarray(_Shared(array)))


class _Shared:
    """The memory of a read-only array as a writable one: torch warns of an array that it could not write to."""

    def __init__(self, array: Any) -> None:
        self.array = array  # which owns the memory
        self.__array_interface__ = {**array.__array_interface__, "data": (array.__array_interface__["data"][0], False)}
