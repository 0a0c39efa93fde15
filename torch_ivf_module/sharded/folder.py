"""Checkpoints of all processes in one folder, of which the newest complete one counts."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import Tensor

from .._files import replace
from .exchange import Exchange

_POINTER = "newest"
KEY = "index"


def newest(folder: str | os.PathLike[str]) -> Path:
    """The last complete checkpoint of `ShardedIndex.save` in a folder: what `torch.distributed.checkpoint` loads.

    Raises FileNotFoundError if there is none.

    >>> newest("there/is/none")
    Traceback (most recent call last):
    FileNotFoundError: no complete checkpoint in there/is/none
    """
    folder = Path(folder)
    pointer = folder / _POINTER
    if pointer.is_file():
        return folder / pointer.read_text(encoding="utf-8").strip()
    if (folder / ".metadata").is_file():  # a checkpoint of torch.distributed.checkpoint itself
        return folder
    raise FileNotFoundError(f"no complete checkpoint in {folder}")


def save(exchange: Exchange, state: dict[str, Tensor], folder: Path) -> None:
    """Write a checkpoint beside the last one and then let the pointer name it; the last one goes at the end."""
    from torch.distributed.checkpoint.state_dict_saver import save as write

    device, lead = state["list_offsets"].device, exchange.rank == 0
    _, said = exchange.agree("save", None, device, lambda: (None, [_next_number(folder) if lead else 0]))
    name = str(int(said[0, 0]))
    _run(
        exchange,
        "save",
        lambda: write({KEY: state}, checkpoint_id=folder / name, process_group=exchange.group),
    )
    # Nobody returns before the pointer is there.
    exchange.agree("save", name, device, lambda: (_publish(folder, name if lead else None), []))


def restore(exchange: Exchange, state: dict[str, Tensor], folder: Path) -> dict[str, Any]:
    """Read the newest checkpoint into `state`, in the sizes it has."""
    from torch.distributed.checkpoint.state_dict_loader import load as read

    from ..dcp import IndexLoadPlanner

    loaded: dict[str, Any] = {KEY: state}
    path, _ = exchange.agree("restore", None, state["list_offsets"].device, lambda: (newest(folder), []))
    _run(
        exchange,
        "restore",
        lambda: read(loaded, checkpoint_id=path, planner=IndexLoadPlanner(), process_group=exchange.group),
    )
    return loaded[KEY]


def _run(exchange: Exchange, step: str, work: Callable[[], Any]) -> None:
    from torch.distributed.checkpoint.api import CheckpointException

    def communicate() -> None:
        try:
            work()
        except CheckpointException as error:  # a BaseException, raised on all ranks when one of them failed
            raise RuntimeError(str(error)) from error

    exchange.run(step, communicate, "the checkpoint was not completed; the one before it, if any, is untouched")


def _next_number(folder: Path) -> int:
    folder.mkdir(parents=True, exist_ok=True)
    return 1 + max((int(part.name) for part in folder.iterdir() if part.name.isdigit()), default=0)


def _publish(folder: Path, name: str | None) -> bool:
    """Let the pointer name a checkpoint and remove the others; nothing to do for a process that is given no name."""
    if name is None:
        return False
    replace(folder / _POINTER, lambda part: _write(part, name))
    for part in folder.iterdir():
        if part.name.isdigit() and part.name != name:
            shutil.rmtree(part, ignore_errors=True)
    return True


def _write(path: str, text: str) -> None:
    Path(path).write_text(text + "\n", encoding="utf-8")
