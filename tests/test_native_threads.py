"""The threads of the kernel, as a C++ program by itself and under the sanitizers of the compiler."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

import torch_ivf_module

NATIVE = Path(torch_ivf_module.__file__).parent / "native"
SOURCES = (Path(__file__).parent / "cpp" / "threads_test.cpp", NATIVE / "threads.cpp")


def program(folder: Path, *flags: str) -> Path:
    """The test program, compiled with `flags`; skips where the compiler does not have them."""
    compiler = shutil.which("c++")
    if compiler is None:
        pytest.skip("needs a C++ compiler")
    made = folder / "threads_test"
    command = [compiler, "-std=c++17", "-g", *flags, f"-I{NATIVE}", *map(str, SOURCES), "-o", str(made), "-pthread"]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode and "sanitize" in done.stderr + "".join(flags):
        pytest.skip(f"the compiler cannot build this: {done.stderr[-200:]}")
    assert done.returncode == 0, done.stderr
    return made


def test_the_pool_also_after_fork(tmp_path):
    done = subprocess.run([program(tmp_path, "-O2", "-Wall", "-Wextra"), "fork"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.long
@pytest.mark.parametrize("sanitizer", ["thread", "address,undefined"])
def test_the_pool_under_a_sanitizer(sanitizer, tmp_path):
    done = subprocess.run([program(tmp_path, "-O1", f"-fsanitize={sanitizer}")], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert not done.stderr
