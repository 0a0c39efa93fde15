"""`python -m tests.sanitize`: the tests of the native kernel, compiled with the compiler's sanitizers.

AddressSanitizer and UndefinedBehaviorSanitizer look at every access and operation of the kernel; with `--thread`
ThreadSanitizer looks for races instead. Needs gcc or clang on Linux, and some minutes. What they find ends the run with
a report and an exit code that is not 0. The tests that run are those of the kernel; other arguments are for pytest.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).parent
TESTS = (
    "test_native.py", "test_native_microkernels.py", "test_codes.py", "test_codec.py", "test_operator.py",
    "test_row_codes.py", "test_filters.py", "test_range_search.py", "test_scalar_quantizer.py",
)  # fmt: skip
THREADED = ("test_threads.py", "test_native.py", "test_updates.py")
# The library of the first of each is loaded before Python.
SANITIZERS = {False: ("address", "undefined"), True: ("thread",)}
# A compiler with these flags after those of the kernel, for its -O3 would take half an hour. It says that it is for no
# machine that is known, so that there is one variant of the kernel, of the instructions that this CPU has.
WRAPPER = """#!/bin/sh
test "$1" = -dumpmachine && exec echo this-cpu
exec {compiler} "$@" {flags}
"""
SETTINGS = {
    "ASAN_OPTIONS": "detect_leaks=0:allocator_may_return_null=1",  # Python and torch keep what they have at the end
    "UBSAN_OPTIONS": "print_stacktrace=1:halt_on_error=1",
    "TSAN_OPTIONS": "halt_on_error=1:ignore_noninstrumented_modules=1",
}


def main(arguments: list[str] | None = None) -> int:
    """Run the command and return its exit code."""
    text = (__doc__ or "").split("\n\n")[0]
    parser = argparse.ArgumentParser(prog="python -m tests.sanitize", description=text)
    parser.add_argument("--thread", action="store_true", help="ThreadSanitizer instead of the others")
    parser.add_argument("--folder", type=Path, help="where the kernel is kept for the next run (default: nowhere)")
    parser.add_argument("--module", help="run this module instead of pytest, with the other arguments: tests.fuzz")
    options, others = parser.parse_known_args(arguments)
    names = SANITIZERS[options.thread]
    compiler = os.environ.get("CXX", "c++")
    flags = f"-O1 -g -march=native -fno-omit-frame-pointer -fsanitize={','.join(names)} -fno-sanitize-recover=all"
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.folder or Path(temporary)
        wrapper = folder / "c++"
        wrapper.write_text(WRAPPER.format(compiler=compiler, flags=flags))
        wrapper.chmod(0o755)
        # Into files, for pytest captures what is printed.
        settings = {name: f"{value}:log_path={folder / 'report'}" for name, value in SETTINGS.items()}
        variables = {**os.environ, **settings, "TORCH_EXTENSIONS_DIR": str(folder)}
        build = [sys.executable, "-c", "from torch_ivf_module import native; native.build()"]
        subprocess.run(build, env={**variables, "CXX": str(wrapper), "TORCH_IVF_NATIVE": "0"}, check=True)
        # Python is not compiled with the sanitizer, and its own library looks for that of C++ when it begins.
        libraries = (f"lib{names[0][0]}san.so", "libstdc++.so")
        variables["LD_PRELOAD"] = " ".join(found(compiler, name) for name in libraries)
        if not options.module:
            others = others or tests(options.thread)
        done = subprocess.run([sys.executable, "-m", options.module or "pytest", *others], env=variables)
        for report in folder.glob("report.*"):
            print(report.read_text(errors="replace"))
            report.unlink()
        return done.returncode


def found(compiler: str, library: str) -> str:
    """The path of a library that comes with the compiler."""
    command = [*compiler.split(), f"-print-file-name={library}"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def tests(threaded: bool) -> list[str]:
    """The files of tests that are run unless others are named."""
    names = THREADED if threaded else TESTS
    return ["-q", "-p", "no:xdist", *(str(HERE / name) for name in names)]


if __name__ == "__main__":
    sys.exit(main())
