"""Names that torch-ivf's indexes have and that have no other use here; see docs/from-torch-ivf.md."""

from __future__ import annotations

from typing import TypeVar

import torch
from torch import nn

Self = TypeVar("Self", bound=nn.Module)


def rocm(self: Self, device: torch.device | str | int | None = None) -> Self:
    """Move to a ROCm device, which torch calls "cuda". RuntimeError for a build of torch without ROCm."""
    if not torch.version.hip:
        raise RuntimeError("this build of PyTorch has no ROCm; use .cuda() or .to(device)")
    return self.to(torch.device("cuda" if device is None else device))


def dml(self: Self, device: torch.device | str | int | None = None) -> Self:
    """Move to a DirectML device. RuntimeError for a build of torch that knows no device of that name."""
    try:
        target = torch.device("dml" if device is None else device)
    except RuntimeError as error:
        raise RuntimeError("PyTorch knows no device 'dml'; use .to(torch_directml.device())") from error
    return self.to(target)
