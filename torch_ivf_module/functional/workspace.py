"""Memory that is used again.

On a CPU every page of fresh memory costs about a microsecond when it is first written to, and what is larger than
32 MiB goes back to the system each time it is freed: without reuse, a large search spends a sixth of its time there.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


class Workspace:
    """One piece of float32 memory, as large as the largest that was ever taken from it."""

    def __init__(self, device: torch.device) -> None:
        self._memory = torch.empty(0, dtype=torch.float32, device=device)

    def take(self, *shape: int) -> Tensor:
        """A tensor of `shape` with anything in it; it shares its memory with whatever was taken before."""
        size = math.prod(shape)
        if self._memory.shape[0] < size:
            self._memory = self._memory.new_empty(0)  # let go of the old one first
            # Written to at once, because that shares the first touch of its pages among the threads.
            self._memory = self._memory.new_empty(size).fill_(0)
        return self._memory[:size].view(shape)
