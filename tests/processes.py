"""Real processes in a gloo group on loopback, for the tests of what is distributed."""

from __future__ import annotations

import multiprocessing
import os
import signal
import tempfile
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

# Processes are forked from one that has imported torch, since the import takes longer than a test. The same holds
# for torch._dynamo, which torch imports when the first tensor is split.
_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(["tests.jobs", "torch._dynamo"])


def run(
    job: Callable[..., None],
    size: int,
    *arguments: Any,
    stopped: int = 0,
    timeout: float = 120,
    group_timeout: float = 60,
) -> list[int | None]:
    """Run ``job(rank, size, *arguments)`` in `size` processes and return how each ended: 0, or minus a signal.

    An exception in one of them fails the test with its traceback. It waits for all processes but those that are
    `stopped`, and none outlives the call.
    """
    with tempfile.TemporaryDirectory() as folder:
        processes = [
            _CONTEXT.Process(target=_work, args=(job, rank, size, folder, group_timeout, arguments), daemon=True)
            for rank in range(size)
        ]
        try:
            for process in processes:
                process.start()
            deadline = time.monotonic() + timeout
            while sum(process.is_alive() for process in processes) > stopped and time.monotonic() < deadline:
                time.sleep(0.02)
            alive = {rank for rank, process in enumerate(processes) if process.is_alive()}
        finally:
            for process in processes:
                if process.pid is not None:
                    process.kill()
                    process.join()
        said = "\n".join(file.read_text() for file in sorted(Path(folder).glob("*.error")))
        assert not said, said
        assert len(alive) <= stopped, f"ranks {sorted(alive)} were not done after {timeout} s"
        return [-signal.SIGSTOP if rank in alive else process.exitcode for rank, process in enumerate(processes)]


def _work(job: Callable[..., None], rank: int, size: int, folder: str, group_timeout: float, arguments: Any) -> None:
    torch.set_num_threads(1)
    try:
        dist.init_process_group(
            "gloo",
            init_method=f"file://{folder}/store",
            rank=rank,
            world_size=size,
            timeout=timedelta(seconds=group_timeout),
        )
        job(rank, size, *arguments)
    except BaseException:
        Path(folder, f"{rank}.error").write_text(f"rank {rank}:\n{traceback.format_exc()}")
    # The process group is not destroyed, because that would wait for processes that a test has killed.
    os._exit(0)
