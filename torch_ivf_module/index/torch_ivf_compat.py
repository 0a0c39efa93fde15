"""Names that torch-ivf's indexes have and that have no other use here; see docs/from-torch-ivf.md."""

from __future__ import annotations

from typing import Any, TypeVar

import numpy
import torch
from torch import Tensor, nn

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


def train(self: Self, mode: bool | Tensor = True, **settings: Any) -> Self:
    """Fit the index to a tensor, as faiss's `train`; or switch the mode, as torch.nn.Module's.

    ``train(x, ...)`` is `fit`; ``train(True)`` and ``train(False)`` set the training flag. For torch-ivf's users
    `max_iter` is `niter`, and `batch_size` and `tol` are accepted without effect.
    """
    given: object = mode
    if isinstance(given, Tensor) or (hasattr(given, "__len__") and not isinstance(given, (str, bytes))):
        names = {"max_iter": "niter"}
        known = {names.get(name, name): value for name, value in settings.items() if name not in ("batch_size", "tol")}
        fitted: Self = self.fit(given, **known)  # type: ignore[operator]
        return fitted
    if not isinstance(mode, (bool, numpy.bool_)):
        raise TypeError(f"train takes a bool or float vectors (n, {self.d}), got {type(mode).__name__}")
    if settings:
        raise TypeError(f"train(mode) takes no {', '.join(settings)}: pass a tensor to fit the index")
    return nn.Module.train(self, bool(mode))
