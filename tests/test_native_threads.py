"""The kernel's threads, and searches with them, as C++ programs by themselves and under the compiler's sanitizers."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

import torch_ivf_module

HERE = Path(__file__).parent / "cpp"
NATIVE = Path(torch_ivf_module.__file__).parent / "native"
SOURCES = {
    "threads": (HERE / "threads_test.cpp", NATIVE / "threads.cpp"),
    "search": (HERE / "search_test.cpp", NATIVE / "threads.cpp", NATIVE / "core.cpp", NATIVE / "codes_core.cpp"),
}


def run(folder: Path, name: str, *flags: str, argument: str = "") -> None:
    """Compile the program with `flags`, and let it check itself; skips where there is no compiler with such flags."""
    compiler = shutil.which("c++")
    if compiler is None:
        pytest.skip("needs a C++ compiler")
    command = [compiler, "-std=c++17", "-g", "-Wall", "-Wextra", "-DTORCH_IVF_ISA=baseline", f"-I{NATIVE}", *flags]
    made = folder / "program"
    done = subprocess.run([*command, *SOURCES[name], "-o", made, "-pthread"], capture_output=True, text=True)
    if done.returncode and any(flag.startswith("-fsanitize") for flag in flags) and "lib" in done.stderr:
        pytest.skip(f"the compiler has no such sanitizer: {done.stderr[-200:]}")
    assert (done.returncode, done.stderr) == (0, "")
    done = subprocess.run([made, argument], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


def test_the_pool_also_after_fork(tmp_path):
    run(tmp_path, "threads", "-O2", argument="fork")


@pytest.mark.long
@pytest.mark.parametrize("sanitizer", ["thread", "address,undefined"])
@pytest.mark.parametrize("name", SOURCES)
def test_under_a_sanitizer(name, sanitizer, tmp_path):
    run(tmp_path, name, "-O1", f"-fsanitize={sanitizer}")
