"""How much memory a call takes, as the operating system counts it (bytes)."""

import ctypes
import gc
import resource
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any


def growth(call: Callable[..., Any], *arguments: Any) -> tuple[int, Any]:
    """Run `call`: how far its peak of resident memory was above the start, and its result."""
    with suppress(OSError):  # Linux: resets the peak; elsewhere it is that of the whole process
        Path("/proc/self/clear_refs").write_text("5")
    before = now()
    result = call(*arguments)
    return max(0, _status("VmHWM") - before), result


def trim() -> None:
    """Return freed memory to the system, so that the next growth does not reuse what an earlier call left."""
    gc.collect()
    malloc_trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if malloc_trim is not None:
        malloc_trim(0)


def now() -> int:
    return _status("VmRSS")


def _status(field: str) -> int:
    """A field of /proc/self/status, or the peak of the whole process where there is no such file."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else peak * 1024
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(field + ":")), 0)
