"""Compiling the kernel: a C++ compiler, and of torch the headers of its stable ABI and the name of its library.

Imports the standard library alone, since setup.py runs this file too, where the package cannot be imported yet.
"""

from __future__ import annotations

import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from os import cpu_count, environ, replace
from pathlib import Path

SOURCES = Path(__file__).parent
# The stable ABI of torch 2.10: what is compiled with the headers of a later version runs with this one too.
OLDEST_TORCH = (2, 10)
_FLAGS = [
    *("-O3", "-std=c++17", "-fPIC", "-pthread", "-fvisibility=hidden", "-DTORCH_TARGET_VERSION=0x020a000000000000"),
    "-fno-math-errno",  # square roots of vectors
    "-ffp-contract=off",  # a product and a sum are rounded as in PyTorch: vectors are decoded to the same numbers
]
# The core is compiled once for each of these; isa.cpp selects one when it is first called. "baseline" is what every CPU
# of the architecture has.
X86_ISAS = {
    "avx2": ["-mavx2", "-mfma", "-mf16c"],
    "avx512": ["-mavx512f", "-mavx512dq", "-mavx512vl", "-mavx512bw", "-mavx2", "-mfma", "-mf16c"],
}
# The part for 8-bit codes for these too, where it is faster than with the instructions above.
X86_CODES_ISAS = {
    **X86_ISAS,
    "avx_vnni": [*X86_ISAS["avx2"], "-mavxvnni"],
    "avx512_vnni": [*X86_ISAS["avx512"], "-mavx512vnni"],
}


class BuildError(RuntimeError):
    """The kernel cannot be built here; the text says what would help."""


def require_tools(torch_folder: Path) -> None:
    """Raise BuildError if a compiler is missing, or the headers in the folder of the package torch."""
    program = _compiler()[0]
    if shutil.which(program) is None:
        raise BuildError(f"there is no C++ compiler {program!r}: install g++ or clang++, or name yours in CXX")
    headers = torch_folder / "include" / "torch" / "csrc" / "stable" / "library.h"
    if not headers.exists():
        oldest = ".".join(map(str, OLDEST_TORCH))
        raise BuildError(f"the kernel needs torch {oldest} or later, with its headers: there is no {headers}")


def compile_kernel(target: Path, torch_folder: Path) -> None:
    """Compile the kernel into the file `target`, which is there whole or not at all. Takes about a minute.

    torch_folder is that of the package torch. Raises BuildError or OSError.
    """
    require_tools(torch_folder)
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="building-", dir=target.parent, ignore_cleanup_errors=True) as folder:
        work = Path(folder)
        objects = _compile_objects(torch_folder, work)
        library = work / target.name
        _run([*_compiler(), "-shared", "-pthread", "-o", library, *objects, *_link_flags(torch_folder)])
        replace(library, target)


def _compiler() -> list[str]:
    return shlex.split(environ.get("CXX", "")) or ["c++"]


def _compile_objects(torch_folder: Path, work: Path) -> list[Path]:
    cxx = _compiler()
    machine = _run([*cxx, "-dumpmachine"]).split("-")[0]
    isas = X86_ISAS if machine == "x86_64" and sys.platform == "linux" else {}
    flags: list[str | Path] = [*_FLAGS, *(["-DTORCH_IVF_X86_ISAS"] if isas else []), "-I", torch_folder / "include"]
    # The texts of errors name source files: the same bytes wherever the files are.
    flags += [f"-ffile-prefix-map={folder.parent}/=" for folder in (torch_folder, SOURCES)]

    def compiled(source: str, name: str, *more: str) -> Path:
        out = work / f"{name}.o"
        _run([*cxx, *flags, *more, "-c", SOURCES / source, "-o", out])
        return out

    def core(name: str, isa: str, flags: Sequence[str] = ()) -> Path:
        out = compiled(f"{name}.cpp", f"{name}_{isa}", f"-DTORCH_IVF_ISA={isa}", *flags)
        return _with_own_symbols(out, f"{name}_{isa}") if isas else out

    with ThreadPoolExecutor(cpu_count()) as pool:
        jobs = [pool.submit(core, "core", isa, flags) for isa, flags in {"baseline": [], **isas}.items()]
        codes = X86_CODES_ISAS if isas else {}
        jobs += [pool.submit(core, "codes_core", isa, flags) for isa, flags in {"baseline": [], **codes}.items()]
        others = (path for path in sorted(SOURCES.glob("*.cpp")) if not path.name.endswith("core.cpp"))
        jobs += [pool.submit(compiled, path.name, path.stem) for path in others]
        return [job.result() for job in jobs]


def _with_own_symbols(file: Path, exported: str) -> Path:
    """The same object with one symbol that others see.

    Templates of the standard library are instantiated in each of the cores, with the instructions of each. The linker
    would take one of them for all, also for the CPU that does not have these instructions.
    """
    cxx, alone = _compiler(), file.with_suffix(".alone.o")
    _run([*cxx, "-r", "-nostdlib", "-Wl,--force-group-allocation", "-o", alone, file])
    objcopy = _run([*cxx, "-print-prog-name=objcopy"]).strip()
    _run([objcopy, "--wildcard", f"--keep-global-symbol=*{exported}*", alone])
    return alone


def _link_flags(torch_folder: Path) -> list[str | Path]:
    # By its name alone: this process has loaded it when it loads the kernel.
    torch_library: list[str | Path] = ["-L", torch_folder / "lib", "-ltorch_cpu"]
    if sys.platform == "darwin":
        return [*torch_library, f"-Wl,-rpath,{torch_folder / 'lib'}"]
    # libtorch has copies of some symbols of the standard library: this one comes first.
    return ["-lstdc++", *torch_library, "-Wl,--strip-all"]


def _run(command: Sequence[str | Path]) -> str:
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, check=False)
    if done.returncode:
        said = done.stderr.strip() or done.stdout.strip() or f"exit status {done.returncode}"
        raise BuildError(f"{command[0]} refused the kernel:\n{said[:4000]}")
    return done.stdout
