"""The kernel's building blocks as a C++ program by itself, for every instruction set, and for another architecture."""

from __future__ import annotations

import platform
import shutil
import subprocess
from pathlib import Path

import pytest

import torch_ivf_module
from torch_ivf_module.native import compiling

NATIVE = Path(torch_ivf_module.__file__).parent / "native"
SOURCE = Path(__file__).parent / "cpp" / "microkernels_test.cpp"
NOT_ON_THIS_CPU = 77


def program(folder: Path, compiler: str, *flags: str) -> Path:
    """The test program, compiled with `flags`; skips where there is no such compiler."""
    if shutil.which(compiler) is None:
        pytest.skip(f"needs {compiler}")
    made = folder / "test"
    command = [compiler, "-std=c++17", "-O1", "-ffp-contract=off", *flags, f"-I{NATIVE}", str(SOURCE), "-o", str(made)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return made


@pytest.mark.parametrize("isa", ["baseline", *compiling.X86_ISAS])
def test_every_instruction_set_computes_what_it_should(isa, tmp_path):
    if isa != "baseline" and platform.machine() not in ("x86_64", "AMD64"):
        pytest.skip("not on this architecture")
    done = subprocess.run([program(tmp_path, "c++", *compiling.X86_ISAS.get(isa, []))], capture_output=True, text=True)
    if done.returncode == NOT_ON_THIS_CPU:
        pytest.skip("not on this CPU")
    assert done.returncode == 0, done.stderr


def test_the_vectors_of_another_architecture_in_an_emulator(tmp_path):
    if (emulator := shutil.which("qemu-aarch64")) is None:
        pytest.skip("needs qemu-aarch64")
    made = program(tmp_path, "aarch64-linux-gnu-g++", "-static")
    done = subprocess.run([emulator, made], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
