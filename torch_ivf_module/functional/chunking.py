"""Some rows at a time: how every step of a search bounds its memory."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor

Result = TypeVar("Result", Tensor, tuple[Tensor, Tensor])


def tracing() -> bool:
    """Whether a graph is being recorded (torch.compile, torch.export, ONNX, torch.jit.trace).

    What is decided by the number of queries would then be decided once and for all.
    """
    return torch.compiler.is_compiling() or torch.jit.is_tracing()  # type: ignore[attr-defined]


def in_chunks(compute: Callable[..., Result], rows: int, *tensors: Tensor) -> Result:
    """``compute(*tensors)``, at most `rows` rows of each tensor at a time; the whole in a graph.

    >>> in_chunks(lambda x, y: x + y, 2, torch.arange(3), torch.ones(3))
    tensor([1., 2., 3.])
    """
    if tracing() or tensors[0].shape[0] <= rows:
        return compute(*tensors)
    return joined([compute(*part) for part in zip(*(tensor.split(rows) for tensor in tensors), strict=True)])


def joined(found: list[Result]) -> Result:
    """The results of parts as one, along the first dimension."""
    if len(found) == 1:
        return found[0]
    if isinstance(found[0], Tensor):
        return torch.cat(found)
    return torch.cat([pair[0] for pair in found]), torch.cat([pair[1] for pair in found])
