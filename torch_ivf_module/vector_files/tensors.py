"""Files of tensors: PyTorch's and safetensors'."""

from __future__ import annotations

import warnings
import zipfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .._optional import require
from .arrays import Array, BadData, Contents

__all__ = ["pt", "safetensors"]

_KINDS = {"BF16": "f", "BOOL": "b"}  # safetensors' names whose first letter is not numpy's kind


def pt(path: Path) -> Contents:
    """A tensor, or those of a dict, as `torch.save` writes them."""
    with warnings.catch_warnings():
        # torch 2.14 says that it checks sparse tensors, which are refused below.
        warnings.filterwarnings("ignore", message="Validating sparse tensor", category=UserWarning)
        # What torch wrote before 1.6 is no archive, and cannot be mapped.
        held = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    if isinstance(held, Tensor):
        held = {"": held}
    if not isinstance(held, dict):
        raise BadData(f"{path} must hold a tensor or a dict of tensors, got {type(held).__name__}")
    return Contents({name: _array(t) for name, t in held.items() if isinstance(name, str) and isinstance(t, Tensor)})


def safetensors(path: Path) -> Contents:
    """The tensors of a ``.safetensors`` file (extra `safetensors`)."""
    file = require("safetensors", "safetensors").safe_open(path, framework="pt")
    return Contents({name: _slice(file.get_slice(name)) for name in file.keys()})  # noqa: SIM118 - not a dict


def _slice(part: Any) -> Array:
    dtype = part.get_dtype()
    kind = _KINDS.get(dtype, dtype[0].lower())
    return Array(tuple(part.get_shape()), kind, lambda start, end: part[start:end])


def _array(tensor: Tensor) -> Array:
    problem = "" if tensor.layout == torch.strided else "is sparse; save its to_dense()"
    return Array(tuple(tensor.shape), _kind(tensor.dtype), lambda start, end: tensor[start:end], problem)


def _kind(dtype: torch.dtype) -> str:
    """The kind of numbers, as numpy has them."""
    if dtype.is_floating_point:
        return "f"
    whole = str(dtype).removeprefix("torch.").startswith(("int", "uint"))
    return ("i" if dtype.is_signed else "u") if whole else "?"
