"""How much memory a call takes, as the operating system counts it (bytes)."""

from __future__ import annotations

import ctypes
import gc
import resource
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

__all__ = ["growth", "now", "trim"]


def growth(call: Callable[[], Any]) -> tuple[int, Any]:
    """Run `call`: by how much the resident memory rose above its start at the highest, and the answer."""
    _forget_peak()
    before = now()
    answer = call()
    return max(0, _peak() - before), answer


def trim() -> None:
    """Hand freed memory back, so that the next growth is not hidden in what an earlier call left behind."""
    gc.collect()
    if sys.platform == "linux":
        malloc_trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if malloc_trim is not None:
            malloc_trim(0)


def now() -> int:
    return _status("VmRSS") or _lifetime_peak()


def _peak() -> int:
    return _status("VmHWM") or _lifetime_peak()


def _forget_peak() -> None:
    """Linux resets the high-water mark when asked; elsewhere it stays the one of the whole process."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return


def _status(field: str) -> int:
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(field + ":")), 0)


def _lifetime_peak() -> int:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
