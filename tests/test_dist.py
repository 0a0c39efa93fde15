"""What is published, as `make wheels` has built it: looked into, and installed where there is nothing else."""

from __future__ import annotations

import email
import email.message
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
import venv
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

import torch_ivf_module
from tests.test_native_isas import BEST_ISAS

pytestmark = pytest.mark.long

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "torch_ivf_module"
KERNEL = "torch_ivf_module/native/_kernel.so"
MOST_BYTES = 2_000_000  # of a wheel: the kernel has eight variants of what computes
# What the kernel may need of libtorch: the C functions whose meaning no version changes.
STABLE = re.compile(r"(aoti_)?torch_[a-z0-9_]+")
# Releases of torch that one binary serves: the one that the tests run with, and a later one, which on Linux comes with
# several gigabytes of CUDA libraries.
PINS = (ROOT / "constraints.txt").read_text()
TORCH = (re.findall("(?m)^torch==(.*)", PINS)[0], "2.14.1")
SEARCH = """
import torch
from torch_ivf_module import IndexIVFFlat, SearchParams, native
x = torch.randn(500, 8, generator=torch.Generator().manual_seed(0))
index = IndexIVFFlat(8, nlist=8, nprobe=8).fit(x)
index.add(x)
assert index.search(x[:5], 1, params=SearchParams(debug_stats=True))[1].flatten().tolist() == [0, 1, 2, 3, 4]
info = native.info()
print(torch.__version__, info["available"], index.last_search_stats["mode"], info["isa"], info["file"])
"""


def run(*command: str | Path, **options: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*map(str, command)], capture_output=True, text=True, check=False, **options)


class Built(NamedTuple):
    """What `make wheels` has put into dist/; native is the wheel with the kernel."""

    native: Path
    pure: Path
    sdist: Path


@pytest.fixture(scope="module")
def built() -> Built:
    found = [list((ROOT / "dist").glob(pattern)) for pattern in ("*-manylinux*.whl", "*-none-any.whl", "*.tar.gz")]
    if [len(files) for files in found] != [1, 1, 1]:
        pytest.skip("dist/ does not hold two wheels and an sdist: make dist")
    return Built(*(files[0] for files in found))


def test_twine_accepts_both(built: Built) -> None:
    pytest.importorskip("twine")
    done = run(sys.executable, "-m", "twine", "check", "--strict", *built)
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_wheels_are_the_package_and_one_kernel(built: Built) -> None:
    kinds = ("*.py", "*.cpp", "*.h", "py.typed")
    package = {str(path.relative_to(ROOT)) for kind in kinds for path in PACKAGE.rglob(kind)}
    for wheel, kernel in ((built.native, {KERNEL}), (built.pure, set())):
        packed = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name and name[-1] != "/"}
        assert packed == package | kernel
        assert wheel.stat().st_size < MOST_BYTES
    assert re.search(r"-py3-none-manylinux_2_\d+_\w+\.whl$", built.native.name)


def test_the_kernel_needs_no_more_of_torch_than_its_stable_functions(built: Built, tmp_path: Path) -> None:
    if (nm := shutil.which("nm")) is None:
        pytest.skip("needs nm, of binutils")
    file = zipfile.ZipFile(built.native).extract(KERNEL, tmp_path)
    listed = run(nm, "-D", "--undefined-only", file).stdout.splitlines()
    needed = {line.split()[-1] for line in listed if " U " in line}
    assert "torch_call_dispatcher" in needed or "torch_library_impl" in needed
    # Beside them the standard library and libc, whose symbols carry versions.
    assert not [name for name in needed if "@" not in name and not STABLE.fullmatch(name)]


def test_nothing_of_the_build_is_in_the_packages(built: Built) -> None:
    """One time for all files, modes that no umask changes, no owner, and no path of this machine in the kernel."""
    with tarfile.open(built.sdist) as archive:
        entries = archive.getmembers()
    assert [entry.name for entry in entries if not entry.isdir()] == sorted(
        (entry.name for entry in entries if not entry.isdir()), key=lambda name: name.split("/")
    )
    assert {(entry.uid, entry.gid, entry.uname, entry.gname) for entry in entries} == {(0, 0, "", "")}
    assert {entry.mode for entry in entries} <= {0o644, 0o755}
    (epoch,) = {entry.mtime for entry in entries}
    for wheel in (built.native, built.pure):
        packed = zipfile.ZipFile(wheel).infolist()
        assert {entry.date_time for entry in packed} == {time.gmtime(epoch - epoch % 2)[:6]}  # zip counts two seconds
        assert {entry.external_attr >> 16 & 0o777 for entry in packed} <= {0o644, 0o755, 0o664}
    kernel = zipfile.ZipFile(built.native).read(KERNEL)
    for folder in (ROOT, Path(sys.prefix), Path(torch.__file__).parent, Path(tempfile.gettempdir())):
        assert os.fsencode(f"{folder}/") not in kernel


def test_the_metadata_says_what_is_so(built: Built) -> None:
    wheel = zipfile.ZipFile(built.native)
    (name,) = (name for name in wheel.namelist() if name.endswith(".dist-info/METADATA"))
    facts: email.message.Message = email.message_from_bytes(wheel.read(name))
    assert (facts["Name"], facts["Version"]) == ("torch-ivf-module", torch_ivf_module.__version__)
    required = facts.get_all("Requires-Dist") or []
    assert [line for line in required if "extra ==" not in line] == ["numpy"]
    assert "torch>=2.13; extra == \"pytorch\"" in required
    assert {"plot", "faiss", "export", "pytorch"} <= set(facts.get_all("Provides-Extra") or [])
    assert any(name.endswith("LICENSE") for name in wheel.namelist())


def test_the_sdist_has_what_is_kept_and_no_rubbish(built: Built) -> None:
    with tarfile.open(built.sdist) as archive:
        packed = {name.partition("/")[2] for name in archive.getnames() if not archive.getmember(name).isdir()}
    kept = {line for line in run("git", "ls-files", cwd=ROOT).stdout.splitlines() if (ROOT / line).exists()}
    if not kept:
        pytest.skip("not a git checkout: nothing says what is kept")
    made = {name for name in packed - kept if name in ("PKG-INFO", "setup.cfg") or ".egg-info/" in name}
    assert packed - kept == made
    # A checkout has what repositories and continuous integration need beside it.
    assert {name for name in kept - packed if not name.startswith(".")} == set()


@pytest.fixture(params=TORCH)
def fresh(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Environment]:
    yield Environment(tmp_path / "venv", request.param)
    shutil.rmtree(tmp_path / "venv")


class Environment:
    """A virtual environment of its own, whose programs find neither a compiler nor ninja."""

    def __init__(self, folder: Path, release: str) -> None:
        venv.create(folder, with_pip=True)
        self.folder, self.release, self.programs = folder.parent, release, folder / "bin"
        (self.folder / "pins.txt").write_text(re.sub("(?m)^torch==.*", f"torch=={release}", PINS))
        left_out = ("PYTHONPATH", "CXX", "CC", "TORCH_IVF_NATIVE", "TORCH_IVF_NATIVE_ISA")
        self.variables = {name: value for name, value in os.environ.items() if name not in left_out}
        self.variables |= {"PATH": str(self.programs), "TORCH_EXTENSIONS_DIR": str(self.folder / "cache")}
        assert not any(shutil.which(name, path=self.variables["PATH"]) for name in ("c++", "g++", "cc", "ninja"))

    def run(self, program: str, *words: str | Path) -> subprocess.CompletedProcess[str]:
        return run(self.programs / program, *words, cwd=self.folder, env=self.variables)

    def install(self, *what: str) -> None:
        done = self.run("python", "-m", "pip", "install", "--no-compile", "-c", self.folder / "pins.txt", *what)
        assert done.returncode == 0, done.stdout + done.stderr


def test_it_searches_natively_at_once_where_there_is_nothing_else(built: Built, fresh: Environment) -> None:
    fresh.install(str(built.native))
    done = fresh.run("python", "-c", "import torch_ivf_module")
    assert "ImportError: torch_ivf_module needs PyTorch" in done.stderr
    fresh.install(f"{built.native}[pytorch]")
    done = fresh.run("python", "-W", "error", "-c", SEARCH)
    assert done.returncode == 0, done.stderr
    version, available, mode, isa, file = done.stdout.split()
    assert (version.partition("+")[0], available, mode) == (fresh.release, "True", "native")
    assert file.endswith(KERNEL)
    assert isa in BEST_ISAS.get(torch.backends.cpu.get_cpu_capability(), ("baseline",))
    assert not (fresh.folder / "cache").exists()
    done = fresh.run("torch-ivf-module", "--help")
    assert done.returncode == 0, done.stderr
    assert "build" in done.stdout
    assert fresh.run("torch-ivf-module", "--version").stdout.split() == [
        "torch_ivf_module",
        torch_ivf_module.__version__,
    ]
    # The wheel of Python alone, in its place: the same answers, by PyTorch operations.
    fresh.install("--force-reinstall", "--no-deps", str(built.pure))
    done = fresh.run("python", "-W", "error", "-c", SEARCH)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split()[1] == "False"
