"""Whether the kernel is there: loading it, and having it built without keeping anyone waiting."""

from __future__ import annotations

import contextlib
import logging
import os
import subprocess
import sys
import threading
import warnings
from collections.abc import Iterator
from pathlib import Path

import torch

from .compiling import BuildError, failure_file, kernel_file, missing_tools
from .meta_kernels import register_meta_kernels

_log = logging.getLogger("torch_ivf_module")
# Multiply-adds of a scan from which a build is worth the while: half a second of one core in PyTorch operations.
_WORTH_BUILDING = 1 << 34
_TRY_AGAIN = "python -m torch_ivf_module build-native"


class _Library:
    """What this process knows of the kernel."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.loaded = False
        self.looked = False  # for a finished build
        self.build: subprocess.Popen[str] | None = None
        self.given_up = False
        self.disabled: list[int] = []  # for each open `disabled()` context the thread that opened it


_library = _Library()


def _after_fork() -> None:
    """In a child: its parent's builds are not its own, nor what other threads of the parent held or had opened."""
    _library.lock = threading.Lock()
    _library.build = None
    _library.disabled = [thread for thread in _library.disabled if thread == threading.get_ident()]


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


def enabled() -> bool:
    """Whether the kernel may be used: not with TORCH_IVF_NATIVE=0, nor within `disabled`."""
    return not _library.disabled and os.environ.get("TORCH_IVF_NATIVE", "1") != "0"


@contextlib.contextmanager
def disabled() -> Iterator[None]:
    """A context in which this process searches by PyTorch operations: all of its threads, not the caller's alone.

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
    """Whether the kernel is loaded, or built so that it can be loaded now. Builds nothing."""
    if not enabled():
        return False
    library = _library
    if library.loaded or library.given_up or (library.looked and library.build is None):
        return library.loaded
    with library.lock:
        if library.build is not None:
            _collect(library.build)
        if not library.loaded and not library.given_up and library.build is None:
            library.looked = True
            _load()
    return library.loaded


def prepare(work: float) -> None:
    """Before a scan of so many multiply-adds: start a build in the background where it would gain and is missing."""
    if work < _WORTH_BUILDING or available() or not enabled():
        return
    with _library.lock:
        if _library.given_up or _library.build is not None or _library.loaded:
            return
        try:
            if kernel_file().exists():  # another process has built it since
                _load()
            elif lack := missing_tools():
                _give_up(f"{lack}. TORCH_IVF_NATIVE=0 keeps this line away")
            elif failure_file().exists():
                _give_up(f"an earlier build failed, see {failure_file()}; {_TRY_AGAIN} tries again")
            else:
                kernel_file().parent.mkdir(parents=True, exist_ok=True)
                _log.warning("building a kernel for this CPU in the background, once; until then searches do without")
                _library.build = subprocess.Popen(
                    _command("--background"),
                    env=_environment(),
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.DEVNULL,
                    stderr=subprocess.PIPE,
                    text=True,
                    start_new_session=True,
                )
        except OSError as error:
            _give_up(str(error))


def build(*, again: bool = False) -> Path:
    """Build the kernel if it is not there, or `again`, and wait for it: its file.

    It takes about half a minute, a C++ compiler and ninja. Raises RuntimeError saying what is missing or what failed.
    A kernel that this process has loaded stays loaded.

    >>> from torch_ivf_module import native
    >>> native.build().name  # doctest: +SKIP
    'kernel.so'
    """
    if available() and not again:
        return kernel_file()
    done = subprocess.run(
        _command(*(["--again"] if again else [])), env=_environment(), capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise BuildError(done.stderr.strip().splitlines()[-1] if done.stderr.strip() else "the build was stopped")
    with _library.lock:
        _library.looked = _library.given_up = False
    return Path(done.stdout.strip().splitlines()[-1])


def _command(*words: str) -> list[str]:
    """Run native/__main__.py of this package, and import nothing from the current folder."""
    if getattr(sys, "frozen", False) or not sys.executable:
        raise OSError("there is no Python to build it with beside this program")
    code = (
        "import runpy, sys; sys.path = [*filter(None, sys.path), sys.argv.pop(1)]; "
        "runpy.run_module('torch_ivf_module.native', run_name='__main__')"
    )
    return [sys.executable, "-c", code, str(Path(__file__).parents[2]), *words]


def _environment() -> dict[str, str]:
    return {**os.environ, "TORCH_IVF_NATIVE": "0"}


def _collect(build: subprocess.Popen[str]) -> None:
    """Look whether the build has ended, and how."""
    if build.poll() is None:
        return
    _library.build = None
    _library.looked = False
    if build.returncode or not kernel_file().exists():
        said = build.stderr.read().strip() if build.stderr else ""
        refused = build.returncode == 1 and said
        _give_up(said.splitlines()[-1] if refused else f"its build was stopped (exit status {build.returncode})")
    if build.stderr:
        build.stderr.close()


def _load() -> None:
    try:
        file = kernel_file()
        if file.exists():
            if os.name == "posix" and file.stat().st_uid not in (0, os.getuid()):
                raise OSError(f"{file} belongs to another user")
            torch.ops.load_library(file)
            register_meta_kernels()
            _library.loaded = True
    except (OSError, RuntimeError) as error:
        _give_up(f"{error}; {_TRY_AGAIN} --again builds it anew")


def _give_up(why: str) -> None:
    """For this process: say so once, and let PyTorch operations answer."""
    _library.given_up = True
    warnings.warn(f"searching without the native kernel, which is faster: {why}", RuntimeWarning, stacklevel=2)
