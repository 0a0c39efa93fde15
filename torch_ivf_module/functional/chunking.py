"""Computing a limited number of rows at a time: how every step of a search bounds its memory."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor

Result = TypeVar("Result", Tensor, tuple[Tensor, Tensor])


def tracing() -> bool:
    """Whether a graph is being recorded (torch.compile, torch.export, ONNX, torch.jit.trace).

    A branch on the number of queries would then be baked into the graph.
    """
    return torch.compiler.is_compiling() or torch.jit.is_tracing()  # type: ignore[attr-defined]


def in_chunks(compute: Callable[..., Result], rows: int, *tensors: Tensor) -> Result:
    """``compute(*tensors)``, with at most `rows` rows of each tensor at a time; in one call while a graph is recorded.

    >>> in_chunks(lambda x, y: x + y, 2, torch.arange(3), torch.ones(3))
    tensor([1., 2., 3.])
    """
    if tracing() or tensors[0].shape[0] <= rows:
        return compute(*tensors)
    return joined([compute(*chunk) for chunk in zip(*(tensor.split(rows) for tensor in tensors), strict=True)])


def joined(results: list[Result]) -> Result:
    """The results of chunks, tensors or pairs of tensors, concatenated along the first dimension."""
    if len(results) == 1:
        return results[0]
    if isinstance(results[0], Tensor):
        return torch.cat(results)
    return torch.cat([pair[0] for pair in results]), torch.cat([pair[1] for pair in results])
