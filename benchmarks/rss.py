"""How much memory a call takes (bytes), as the operating system counts it; on an accelerator, as torch does."""

import ctypes
import gc
import resource
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from . import device


def growth(call: Callable[..., Any], *arguments: Any) -> tuple[int, Any]:
    """Run `call`: how far its peak of resident memory was above the start, and its result."""
    if device.name != "cpu":
        torch.accelerator.reset_peak_memory_stats()
        before, result = now(), call(*arguments)
        return torch.accelerator.max_memory_allocated() - before, result
    with suppress(OSError):  # Linux: resets the peak; elsewhere it is that of the whole process
        Path("/proc/self/clear_refs").write_text("5")
    before = now()
    result = call(*arguments)
    return max(0, now("VmHWM") - before), result


def trim() -> None:
    """Return freed memory to the system, so that the next growth does not reuse what an earlier call left."""
    gc.collect()
    if sys.platform == "linux":
        getattr(ctypes.CDLL(None), "malloc_trim", lambda pad: 0)(0)


def now(field: str = "VmRSS") -> int:
    """Resident memory, or another field of /proc/self/status; the peak of the process where there is no such file."""
    if device.name != "cpu":
        return torch.accelerator.memory_allocated()
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(field + ":")), 0)
