"""Loading the kernel: the file in the package, or else the one that `build` has compiled."""

from __future__ import annotations

import contextlib
import hashlib
import os
import platform
import shutil
import threading
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock

from .compiling import SOURCES, BuildError, compile_kernel
from .meta_kernels import register_meta_kernels

PACKAGED = SOURCES / "_kernel.so"  # in a wheel that was built with it
_LOCK_TIMEOUT = 600.0  # seconds to wait for another process that builds the same file


class _Library:
    """The state of the kernel in this process."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.looked = False  # whether loading was tried
        self.file: Path | None = None  # the file that is loaded
        self.why_not: str | None = None
        self.switched_off = os.environ.get("TORCH_IVF_NATIVE") == "0"  # read once, since every search uses it
        self.disabled: list[int] = []  # the thread of each open `disabled()` context


_library = _Library()


def _after_fork() -> None:
    """In a child process: a new lock, and only the `disabled()` contexts of the thread that forked."""
    _library.lock = threading.Lock()
    _library.disabled = [thread for thread in _library.disabled if thread == threading.get_ident()]


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


def enabled() -> bool:
    """Whether the kernel may be used: not if TORCH_IVF_NATIVE was 0 at import, and not within `disabled`."""
    return not _library.disabled and not _library.switched_off


@contextlib.contextmanager
def disabled() -> Iterator[None]:
    """A context in which all threads of this process search by PyTorch operations.

    >>> from torch_ivf_module import native
    >>> with native.disabled():
    ...     native.available()
    False
    """
    thread = threading.get_ident()
    with _library.lock:
        _library.disabled.append(thread)
    try:
        yield
    finally:
        with _library.lock:
            _library.disabled.remove(thread)


def available() -> bool:
    """Whether the kernel is loaded, or can be loaded now. It is not compiled.

    Warns once if there is a kernel that cannot be loaded. Raises RuntimeError if TORCH_IVF_NATIVE_ISA names an
    instruction set that this CPU lacks.
    """
    if _library.disabled or _library.switched_off:  # `enabled` without a call, since every search calls this
        return False
    if not _library.looked:
        with _library.lock:
            if not _library.looked:
                _load()
                _library.looked = True
    return _library.file is not None


def info() -> dict[str, Any]:
    """The kernel for CPUs: available (bool), file (str or None), isa (str or None), why_not (str or None).

    isa is the instruction set in use: "baseline", "avx2", "avx_vnni", "avx512" or "avx512_vnni" (vnni: products of
    bytes, for codes). It is the best one of this CPU, or the value of the environment variable TORCH_IVF_NATIVE_ISA.
    Raises RuntimeError if this CPU does not support that value.

    >>> from torch_ivf_module import native
    >>> sorted(native.info())
    ['available', 'file', 'isa', 'why_not']
    """
    if available():
        isa = torch.ops.torch_ivf_module.isa()
        return {"available": True, "file": str(_library.file), "isa": isa, "why_not": None}
    why_not = "it is turned off" if not enabled() else _library.why_not
    return {"available": False, "file": None, "isa": None, "why_not": why_not}


def build(*, again: bool = False) -> Path:
    """Compile the kernel if none can be loaded, or with `again`, and return its file.

    This needs a C++ compiler, and takes about a minute. Raises RuntimeError with the reason if it fails. A kernel that
    this process has already loaded stays loaded.

    >>> from torch_ivf_module import native
    >>> native.build().name  # doctest: +SKIP
    'kernel.so'
    """
    if available() and not again:
        assert _library.file is not None
        return _library.file
    target = kernel_file()
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(target.parent / "lock", timeout=_LOCK_TIMEOUT):
            if again or not target.exists():
                for left in target.parent.glob("building-*"):  # by a build that was killed
                    shutil.rmtree(left, ignore_errors=True)
                compile_kernel(target, Path(torch.__file__).parent)
    except OSError as error:
        raise BuildError(f"the kernel cannot be compiled into {target.parent}: {error}") from error
    _library.looked = _library.file is not None
    return target


def kernel_file() -> Path:
    """The file that `build` writes for this source code: below TORCH_EXTENSIONS_DIR, or in a cache folder."""
    cache = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    root = Path(os.environ.get("TORCH_EXTENSIONS_DIR") or Path(cache, "torch_extensions"))
    files = [SOURCES / "compiling.py", *sorted(SOURCES.glob("*.[ch]*"))]
    parts = [platform.machine(), *(path.read_text(encoding="utf-8") for path in files)]
    key = hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]
    return root.expanduser() / "torch_ivf_module" / key / "kernel.so"


def _load() -> None:
    """Load the first file that can be loaded."""
    refused = []
    for file in (PACKAGED, kernel_file()):
        try:
            if not file.exists():
                continue
            if file != PACKAGED and os.name == "posix" and file.stat().st_uid not in (0, os.getuid()):
                raise OSError(f"{file} belongs to another user")
            torch.ops.load_library(file)
        except OSError as error:
            refused.append(str(error))
            continue
        torch.ops.torch_ivf_module.isa()  # raises if TORCH_IVF_NATIVE_ISA asks for what this CPU lacks
        register_meta_kernels()
        _library.file = file
        return
    _library.why_not = "; ".join(refused) or "there is none: python -m torch_ivf_module build-native compiles one"
    if refused:
        again = "python -m torch_ivf_module build-native --again builds it anew"
        text = f"searching without the native kernel, which is faster: {_library.why_not}; {again}"
        warnings.warn(text, RuntimeWarning, stacklevel=2)
