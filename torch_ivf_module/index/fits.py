"""One name for two things: faiss's `train(x)` and torch.nn.Module's `train(mode)`."""

from __future__ import annotations

from typing import Any, TypeVar

import numpy
from torch import Tensor, nn

Self = TypeVar("Self", bound="Fits")


class Fits(nn.Module):
    """A module whose `train` takes a tensor to fit as well as a mode; `fit` is the unambiguous spelling."""

    d: int

    def train(self: Self, mode: bool | Tensor = True, **settings: Any) -> Self:
        """Fit the index to a tensor, as faiss's `train`; or switch the mode, as torch.nn.Module's.

        ``train(x, ...)`` is `fit`; ``train(True)`` and ``train(False)`` set the training flag.
        """
        given: object = mode
        if isinstance(given, Tensor) or (hasattr(given, "__len__") and not isinstance(given, (str, bytes))):
            return self.fit(given, **settings)
        if not isinstance(mode, (bool, numpy.bool_)):
            raise TypeError(f"train takes a bool or float vectors (n, {self.d}), got {type(mode).__name__}")
        if settings:
            raise TypeError(f"train(mode) takes no {', '.join(settings)}: pass a tensor to fit the index")
        return super().train(bool(mode))

    def fit(self: Self, *args: Any, **settings: Any) -> Self:
        """Fit to a tensor (n, d)."""
        raise NotImplementedError
