"""Gather and dot product in one call, where PyTorch has it: a product sampled at the pattern of a CSR matrix.

B rows of the pattern, W entries per row, N vectors, d dim.
"""

from __future__ import annotations

import functools
import warnings

import torch
from torch import Tensor

from .chunking import tracing


def has_sampled_product(x: Tensor, packed: Tensor, width: int) -> bool:
    """Whether `sampled_product` serves these tensors: float32 on a CPU, rows no longer than there are vectors."""
    if tracing():  # no graph format has this operation
        return False
    return packed.device.type == "cpu" and packed.dtype == x.dtype == torch.float32 and width <= packed.shape[0]


def sampled_product(x: Tensor, packed: Tensor, rows: Tensor, start: Tensor) -> Tensor:
    """``start + <x[b], packed[rows[b]]>`` (B, W) without gathering; x (B, d), rows (B, W) int64, start (B, W).

    PyTorch divides the rows of the pattern among its threads, so a few long rows are best split into several.
    """
    count, width = rows.shape
    _silence_sparse_notices()
    ends = torch.arange(0, rows.numel() + 1, max(1, width), device=rows.device)
    size = (count, packed.shape[0])
    pattern = torch.sparse_csr_tensor(
        ends, rows.flatten(), start.flatten(), size=size, device=rows.device, check_invariants=False
    )
    # `out` is the pattern: a new result tensor would refuse a row with one column twice, which padding has.
    torch.sparse.sampled_addmm(pattern, x, packed.t(), out=pattern)
    return pattern.values().view(count, width)


@functools.cache
def _silence_sparse_notices() -> None:
    """Make PyTorch give its notice that CSR tensors are in beta, once per process, where warnings are ignored."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        ends, one = torch.tensor([0, 1], device="cpu"), torch.tensor([0], device="cpu")
        torch.sparse_csr_tensor(ends, one, one, size=(1, 1), device="cpu")
