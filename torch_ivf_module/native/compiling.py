"""Compiling the kernel, once for a version of torch, a kind of CPU and a state of the source.

What is built lies in ``torch_ivf_module/<key>`` under torch's folder of extensions (TORCH_EXTENSIONS_DIR, or
``~/.cache/torch_extensions``). It is compiled in a folder of its own and renamed, so that it is there whole or not at
all; a lock that the system drops with its process keeps two processes from doing the same work.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import platform
import shlex
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch
from filelock import FileLock

_SOURCES = Path(__file__).parent
_PATIENCE = 600.0  # seconds to wait for another process that builds the same
# What the compiler may take for granted on a CPU, by the name torch has for it; with another name, nothing.
_ARCHITECTURE = {
    "AVX2": ["-mavx2", "-mfma", "-mf16c"],
    "AVX512": ["-mavx512f", "-mavx512dq", "-mavx512vl", "-mavx512bw", "-mfma", "-mf16c"],
}


class BuildError(RuntimeError):
    """The kernel cannot be built here; the text says what would help."""


def kernel_file() -> Path:
    """Where the kernel for this torch, this CPU and this source is, once it is built."""
    return _folder() / "kernel.so"


def failure_file() -> Path:
    """What the compiler said when it last refused this source; not there if it did not."""
    return _folder() / "failed.txt"


def _folder() -> Path:
    cache = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    root = Path(os.environ.get("TORCH_EXTENSIONS_DIR") or Path(cache, "torch_extensions"))
    return root.expanduser() / "torch_ivf_module" / _key()


def _key() -> str:
    parts = [torch.__version__, str(torch.version.git_version), platform.machine(), *_flags()]
    parts += [path.read_text(encoding="utf-8") for path in sorted(_SOURCES.glob("*.[ch]*"))]
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]


def _flags() -> list[str]:
    capability = torch.backends.cpu.get_cpu_capability()
    known = capability if capability in _ARCHITECTURE else "DEFAULT"
    defines = [f"-DCPU_CAPABILITY={known}", f"-DCPU_CAPABILITY_{known}"]
    return ["-O3", *_ARCHITECTURE.get(known, []), *defines, *([] if sys.platform == "darwin" else ["-fopenmp"])]


def missing_tools() -> str | None:
    """What is missing that a build needs, in words, or None."""
    from torch.utils.cpp_extension import get_cxx_compiler, is_ninja_available

    compiler = get_cxx_compiler()
    if shutil.which(shlex.split(compiler)[0]) is None:
        return f"there is no C++ compiler {compiler!r}: install g++ or clang++, or name yours in CXX"
    with _scripts_on_path():
        return None if is_ninja_available() else "ninja is missing: pip install ninja"


@contextlib.contextmanager
def _scripts_on_path() -> Iterator[None]:
    """Programs that pip installed beside this Python are found, activated environment or not."""
    before = os.environ.get("PATH", "")
    os.environ["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), before])
    try:
        yield
    finally:
        os.environ["PATH"] = before


def build_kernel(*, again: bool = False) -> Path:
    """Build the kernel if it is not there, or `again`, and return its file. Raises BuildError or OSError."""
    target = kernel_file()
    if target.exists() and not again:
        return target
    if lack := missing_tools():
        raise BuildError(f"the native kernel cannot be built: {lack}")
    target.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(target.parent / "lock", timeout=_PATIENCE):
        if target.exists() and not again:
            return target
        for left in target.parent.glob("building-*"):  # by a build that was killed
            shutil.rmtree(left, ignore_errors=True)
        with tempfile.TemporaryDirectory(prefix="building-", dir=target.parent, ignore_cleanup_errors=True) as work:
            os.replace(_compile(Path(work)), target)
        failure_file().unlink(missing_ok=True)
    return target


def _compile(work: Path) -> Path:
    from torch.utils import cpp_extension

    flags = _flags()
    try:
        with _scripts_on_path():
            cpp_extension.load(
                "kernel",
                [str(_SOURCES / "kernel.cpp")],
                extra_cflags=flags,
                extra_ldflags=[flag for flag in flags if flag == "-fopenmp"],
                build_directory=str(work),
                with_cuda=False,
                is_python_module=False,
            )
    except (RuntimeError, OSError) as error:
        with contextlib.suppress(OSError):
            failure_file().write_text(str(error), encoding="utf-8")
        raise BuildError(
            f"the compiler refused the native kernel; what it said is in {failure_file()}. "
            "python -m torch_ivf_module build-native tries again"
        ) from error
    return work / f"kernel{cpp_extension.LIB_EXT}"
