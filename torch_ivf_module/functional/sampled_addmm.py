"""A gather and a dot product in one call, where PyTorch has one: a product sampled at the pattern of a CSR matrix.

B rows of the pattern, W entries a row, N vectors, d dim.
"""

from __future__ import annotations

import functools
import warnings

import torch
from torch import Tensor

from .chunking import tracing


def has_sampled_product(x: Tensor, packed: Tensor, width: int) -> bool:
    """Whether `sampled_product` serves these tensors: float32 on a CPU, rows no longer than there are vectors."""
    if tracing():  # no graph format has it
        return False
    return packed.device.type == "cpu" and packed.dtype == x.dtype == torch.float32 and width <= packed.shape[0]


def sampled_product(x: Tensor, packed: Tensor, rows: Tensor, start: Tensor) -> Tensor:
    """``start + <x[b], packed[rows[b]]>`` (B, W) without gathering; x (B, d), rows (B, W) int64, start (B, W).

    It runs a thread over rows of the pattern, so a few long rows are best cut into several.
    """
    count, width = rows.shape
    _silence_sparse_notices()
    ends = torch.arange(0, rows.numel() + 1, max(1, width), device=rows.device)
    size = (count, packed.shape[0])
    pattern = torch.sparse_csr_tensor(
        ends, rows.flatten(), start.flatten(), size=size, device=rows.device, check_invariants=False
    )
    # Written over the pattern: a fresh result would refuse a row that names a vector twice, as padding does.
    torch.sparse.sampled_addmm(pattern, x, packed.t(), out=pattern)
    return pattern.values().view(count, width)


@functools.cache
def _silence_sparse_notices() -> None:
    """PyTorch says once a process that CSR tensors are in beta; say it to nobody."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        ends, one = torch.tensor([0, 1], device="cpu"), torch.tensor([0], device="cpu")
        torch.sparse_csr_tensor(ends, one, one, size=(1, 1), device="cpu")
