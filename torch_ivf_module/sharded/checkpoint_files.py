"""Checkpoints of all processes in one folder; the file `newest` names the last complete one."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import Tensor

from .._files import replace
from .collectives import Exchange

_POINTER = "newest"
_NAME = re.compile(r"index-([0-9]{6,})")  # of a checkpoint; nothing else in the folder is removed
KEY = "index"


def newest(folder: str | os.PathLike[str]) -> Path:
    """The path of the last complete checkpoint of `ShardedIndex.save` in a folder, for `torch.distributed.checkpoint`.

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


def save(exchange: Exchange, state: dict[str, Tensor], path: str | os.PathLike[str]) -> None:
    """Write a checkpoint beside the previous one, name it in the file `newest`, and remove the previous one."""
    from torch.distributed.checkpoint.state_dict_saver import save as write

    device, lead = state["list_offsets"].device, exchange.rank == 0
    folder, said = exchange.agree("save", device, lambda: _opened(Path(path), lead))
    name = f"index-{int(said[0, 0]):06d}"
    _run(
        exchange,
        "save",
        lambda: write({KEY: state}, checkpoint_id=folder / name, process_group=exchange.group),
        "the checkpoint was not completed; the one before it, if any, is untouched",
    )
    # No process returns before the file names the new checkpoint.
    exchange.agree("save", device, lambda: (_publish(folder, name if lead else None), []))


def restore(exchange: Exchange, state: dict[str, Tensor], path: str | os.PathLike[str]) -> dict[str, Any]:
    """Read the newest checkpoint into `state`, whose tensors take the sizes of the checkpoint."""
    from torch.distributed.checkpoint.state_dict_loader import load as read

    from ..dcp import IndexLoadPlanner

    loaded: dict[str, Any] = {KEY: state}
    device, lead = state["list_offsets"].device, exchange.rank == 0

    def chosen() -> tuple[tuple[Path, str], list[int]]:
        folder = Path(path)
        return (folder, os.path.relpath(newest(folder), folder) if lead else ""), []

    (folder, name), _ = exchange.agree("restore", device, chosen)
    name = exchange.broadcast_text("restore", name, device)  # all read the same one, also if another is saved meanwhile
    _run(
        exchange,
        "restore",
        lambda: read(loaded, checkpoint_id=folder / name, planner=IndexLoadPlanner(), process_group=exchange.group),
        "the checkpoint could not be read; the index is as before the call",
    )
    return loaded[KEY]


def _run(exchange: Exchange, step: str, work: Callable[[], Any], meaning: str) -> None:
    from torch.distributed.checkpoint.api import CheckpointException

    def communicate() -> None:
        try:
            work()
        except CheckpointException as error:  # a BaseException, raised on all ranks when one of them failed
            raise RuntimeError(str(error)) from error

    exchange.run(step, communicate, meaning)


def _opened(folder: Path, lead: bool) -> tuple[Path, list[int]]:
    """The folder, and on the leading process the number of the next checkpoint in it, else 0."""
    if not lead:
        return folder, [0]
    folder.mkdir(parents=True, exist_ok=True)
    return folder, [1 + max((int(match[1]) for match in map(_NAME.fullmatch, os.listdir(folder)) if match), default=0)]


def _publish(folder: Path, name: str | None) -> bool:
    """Name a checkpoint in the file `newest` and remove the others; without a name do nothing."""
    if name is None:
        return False
    replace(folder / _POINTER, lambda part: _write(part, name))
    for part in folder.iterdir():
        if _NAME.fullmatch(part.name) and part.name != name:
            shutil.rmtree(part, ignore_errors=True)
    return True


def _write(path: str, text: str) -> None:
    Path(path).write_text(text + "\n", encoding="utf-8")
