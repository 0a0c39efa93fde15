"""The collectives of one process group. All are called here, with the name of the step, which errors contain.

W processes, n rows of one process.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable
from typing import Any, NoReturn, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

T = TypeVar("T")
_VALUES = 2  # numbers that a process may tell the others when they agree
_GONE = (
    "another process may have ended, or did not answer within the group's timeout; the index here is as before the "
    "call, but the processes have to be started again"
)


class Refused(RuntimeError):
    """Another process refused its input or failed, or the calls differ: nothing is wrong with the group."""


class Exchange:
    """Communication between the processes of a group. An error names the step on every process that raises it."""

    def __init__(self, group: dist.ProcessGroup | None = None) -> None:
        if not (dist.is_available() and dist.is_initialized()):
            raise RuntimeError("there is no process group: call torch.distributed.init_process_group() first")
        self.group = _everybody() if group is None else group
        self.rank = dist.get_rank(group)
        self.size = dist.get_world_size(group)
        if self.rank < 0:
            raise ValueError("process_group does not contain this process")

    @property
    def device(self) -> torch.device:
        """A device whose tensors the group can send."""
        return torch.device("cuda" if dist.get_backend(self.group) == "nccl" else "cpu")

    def __deepcopy__(self, memo: dict[int, Any]) -> Exchange:
        return self  # a group is not copied

    def __reduce__(self) -> NoReturn:
        raise TypeError(
            "a ShardedIndex cannot be pickled, since its process group is of this process: use save(folder), or its "
            "state_dict() with torch.distributed.checkpoint"
        )

    def run(self, step: str, communicate: Callable[[], T], meaning: str = _GONE) -> T:
        """The result of `communicate`, which waits for the other processes; RuntimeError with the step if it fails."""
        try:
            return communicate()
        except RuntimeError as error:  # every error of torch.distributed is one
            raise RuntimeError(f"{step}: rank {self.rank} of {self.size}: {meaning} ({error})") from error

    def agree(
        self,
        step: str,
        device: torch.device,
        prepare: Callable[[], tuple[T, list[int]]],
        settings: Callable[[], object] = lambda: None,
    ) -> tuple[T, Tensor]:
        """Call `prepare`, and return only if it succeeded on all processes and their step and settings are the same.

        `prepare` returns a result and up to two numbers for the other processes. Returned are the result and the
        numbers of all processes (W, 2). Without this step, a process that refuses its input would leave the others
        waiting, so everything that may fail is done in `prepare` or in `settings`, which is called after it.
        """
        problem: Exception | None = None
        told, result = [0], list[T]()
        try:
            found, values = prepare()
            told = [1, zlib.crc32(repr((step, settings())).encode()), *values]
            result.append(found)
        except Exception as error:
            problem = error
        words = torch.tensor(told + [0] * (2 + _VALUES - len(told)), dtype=torch.int64, device=device)
        said = self.all_gather(step, words).cpu()
        if problem is not None:
            raise problem
        refused = torch.nonzero(said[:, 0] == 0)
        if refused.shape[0]:
            raise Refused(
                f"{step}: rank {int(refused[0])} refused its input or failed: see its own error; no rank was changed"
            )
        other = torch.nonzero(said[:, 1] != said[0, 1])
        if other.shape[0]:
            raise Refused(
                f"{step}: rank {int(other[0])} called another method than rank 0, or with other settings: "
                "all ranks must make the same calls in the same order"
            )
        return result[0], said[:, 2:]

    def all_gather(self, step: str, tensor: Tensor) -> Tensor:
        """The tensors (...) of all processes, which have one shape, stacked: (W, ...)."""
        parts = [torch.empty_like(tensor) for _ in range(self.size)]
        self.run(step, lambda: dist.all_gather(parts, tensor.contiguous(), group=self.group))
        return torch.stack(parts)

    def all_gather_rows(self, step: str, tensor: Tensor, counts: Tensor) -> Tensor:
        """The rows (n, ...) of all processes, concatenated by rank; counts (W,) are the numbers of rows."""
        padded = tensor.new_zeros((int(counts.max()), *tensor.shape[1:]))
        padded[: tensor.shape[0]] = tensor
        parts = self.all_gather(step, padded)
        return torch.cat([part[:count] for part, count in zip(parts, counts.tolist(), strict=True)])

    def all_reduce(self, step: str, tensor: Tensor) -> Tensor:
        """The sum over all processes, written into `tensor`."""
        self.run(step, lambda: dist.all_reduce(tensor, group=self.group))
        return tensor

    def broadcast(self, step: str, tensor: Tensor) -> Tensor:
        """The tensor of rank 0, written into `tensor`."""
        self.run(step, lambda: dist.broadcast(tensor, group=self.group, group_src=0))
        return tensor

    def broadcast_text(self, step: str, text: str, device: torch.device) -> str:
        """The text of rank 0."""
        texts = [text]
        self.run(step, lambda: dist.broadcast_object_list(texts, group=self.group, group_src=0, device=device))
        return texts[0]

    def all_to_all(
        self, step: str, counts: Tensor, *tensors: Tensor, arriving: Tensor | None = None
    ) -> tuple[list[Tensor], Tensor]:
        """Send the first ``counts[0]`` rows of each tensor to rank 0, the next ``counts[1]`` to rank 1, and so on.

        Returns the rows that arrive, ordered by rank, and their number from each rank (W,), `arriving` if known.
        """
        if arriving is None:
            arriving = torch.empty_like(counts)
            self._all_to_all(step, [(arriving, counts)], [1] * self.size, [1] * self.size)
        total, takes, gives = int(arriving.sum()), arriving.tolist(), counts.tolist()
        fresh = [tensor.new_empty((total, *tensor.shape[1:])) for tensor in tensors]
        self._all_to_all(step, list(zip(fresh, tensors, strict=True)), takes, gives)
        return fresh, arriving

    def _all_to_all(self, step: str, pairs: list[tuple[Tensor, Tensor]], takes: list[int], gives: list[int]) -> None:
        def communicate() -> None:
            works = [
                dist.all_to_all_single(_bytes(fresh), _bytes(old), takes, gives, group=self.group, async_op=True)
                for fresh, old in pairs
            ]
            for work in works:
                work.wait()

        self.run(step, communicate)


def _everybody() -> dist.ProcessGroup:
    group = dist.group.WORLD
    assert group is not None
    return group


def _bytes(tensor: Tensor) -> Tensor:
    """Rows (n, ...) as bytes (n, m): gloo has no bfloat16."""
    rows = tensor.contiguous()
    return (rows.flatten(1) if rows.dim() > 1 else rows[:, None]).view(torch.uint8)
