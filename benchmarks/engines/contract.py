"""What an adapter is: it takes float32 numpy rows and gives numpy ids.

`native` turns rows, once and outside the clock, into what its library reads; `search` is the library's own call and
nothing else.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

__all__ = ["Engine", "Spec", "TorchEngine"]


@dataclass(frozen=True)
class Spec:
    """What an index is to be."""

    d: int
    nlist: int
    metric: str = "l2"  # "l2", "ip" or "cosine"; for cosine every row comes at unit length
    seed: int = 1234
    threads: int = 2


class Engine:
    """The contract of an adapter; `index` is the library's own object."""

    knob: ClassVar[str | None] = "nprobe"  # what trades recall for speed; None where nothing does
    index: Any

    def __init__(self, spec: Spec) -> None:
        self.spec = spec

    def native(self, x: np.ndarray) -> Any:
        return x

    def train(self, x: np.ndarray, niter: int | None = None) -> None:
        """Fit the lists, if the library has any, in `niter` rounds or as many as it takes unasked."""

    def centroids(self) -> np.ndarray:
        raise NotImplementedError

    def use_centroids(self, centroids: np.ndarray) -> None:
        raise NotImplementedError

    def add(self, x: Any) -> None:
        """Add native rows; they are numbered from 0 in the order they come."""
        self.index.add(x)

    def remove(self, ids: Any) -> None:
        """Remove vectors by native ids."""
        self.index.remove_ids(ids)

    def set(self, value: int) -> None:
        """Set the knob."""
        self.index.nprobe = value

    def search(self, x: Any, k: int) -> Any:
        return self.index.search(x, k)

    def ids(self, answer: Any) -> np.ndarray:
        return np.asarray(answer[1]).astype(np.int64)


class TorchEngine(Engine):
    def native(self, x: np.ndarray) -> Any:
        import torch

        return torch.from_numpy(np.ascontiguousarray(x))
