"""Building the kernel: whatever goes wrong, searches are answered, by PyTorch operations and with one warning.

A build here takes a compiler that is quick: a script that hands over the kernel that is built already, or refuses.
Without that one, as on a machine without a compiler, the tests that need it are skipped.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import stat
import subprocess
import sys
import threading
import time
import warnings
from pathlib import Path

import pytest
import torch

from torch_ivf_module import IndexFlatL2, SearchParams, native
from torch_ivf_module.native import library
from torch_ivf_module.native.compiling import kernel_file

ROOT = Path(__file__).parent.parent
NINJA = shutil.which("ninja", path=os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]))
BUILT = kernel_file() if native.available() else None  # before a test moves the folder
needs_kernel = pytest.mark.skipif(BUILT is None, reason="no kernel: python -m torch_ivf_module build-native")
needs_ninja = pytest.mark.skipif(NINJA is None, reason="no ninja")


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """A process that knows of no kernel yet, an empty folder for one, and a first search that is worth a build."""
    folder = tmp_path / "cache"
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(folder))
    monkeypatch.setattr(library, "_library", library._Library())
    monkeypatch.setattr(library, "_WORTH_BUILDING", 1)
    return folder


def searched():
    """Search, as any caller does: the mode that answered, and what was warned of."""
    x = torch.randn(64, 8, generator=torch.Generator().manual_seed(0))
    index = IndexFlatL2(8)
    index.add(x)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        found = index.search(x, 1, params=SearchParams(debug_stats=True))[1][:, 0]
    assert torch.equal(found, torch.arange(64))
    return index.last_search_stats["mode"], [str(one.message) for one in caught]


def ended():
    """Wait for the build that a search has begun."""
    library._library.build.wait(60)


@pytest.fixture
def compiler(tmp_path):
    """Make a C++ compiler of a shell script; $out is the file it is asked for."""

    def make(body):
        path = tmp_path / "bin" / "c++"
        path.parent.mkdir(exist_ok=True)
        path.write_text(
            "#!/bin/sh\n"
            'for word in "$@"; do case $word in -v|--version|-dumpversion) echo "g++ 12.2.0"; exit 0;; esac; done\n'
            'out=; before=; for word in "$@"; do [ "$before" = -o ] && out=$word; before=$word; done\n' + body
        )
        path.chmod(path.stat().st_mode | stat.S_IXUSR)
        return str(path)

    return make


@needs_kernel
@needs_ninja
def test_a_long_search_has_it_built_and_later_ones_take_it(tmp_path, compiler):
    # In processes of their own: a kernel is loaded once.
    code = """
import logging
from tests.test_native_build import ended, library, searched
logging.basicConfig(format="LOG %(message)s")
library._WORTH_BUILDING = 1
print(searched())
if library._library.build:
    ended()
print(searched())
"""
    hands_over = compiler(f'case $out in *.so) cp "{BUILT}" "$out";; *) : > "$out";; esac\n')
    variables = {**os.environ, "TORCH_EXTENSIONS_DIR": str(tmp_path / "cache"), "CXX": hands_over}
    say = lambda: subprocess.run(  # noqa: E731
        [sys.executable, "-c", code], cwd=ROOT, env=variables, capture_output=True, text=True, timeout=120, check=True
    )
    first = say()
    assert first.stdout.splitlines()[0] in ("('csr', [])", "('matrix', [])")  # nobody waits for a build
    assert first.stdout.splitlines()[1] == "('native', [])"
    assert first.stderr.count("LOG building") == 1
    built = [path.name for path in (tmp_path / "cache" / "torch_ivf_module").rglob("*") if path.is_file()]
    assert sorted(built) == ["kernel.so", "lock"]
    variables["CXX"] = "no-such-compiler"  # none is needed any more
    second = say()
    assert second.stdout.splitlines() == ["('native', [])"] * 2
    assert "LOG" not in second.stderr


@pytest.mark.skipif(os.name != "posix", reason="another name for a shared library")
def test_a_file_that_is_no_library_is_told_of_once(cache):
    file = kernel_file()
    file.parent.mkdir(parents=True)
    file.write_bytes(b"not a library")
    mode, (said,) = searched()
    assert mode != "native"
    assert "build-native --again" in said
    assert searched() == (mode, [])


def test_without_a_compiler_one_warning_says_what_to_install(cache, monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    mode, (said,) = searched()
    assert mode != "native"
    assert "install g++ or clang++" in said
    assert "TORCH_IVF_NATIVE=0" in said
    assert searched() == (mode, [])
    with pytest.raises(RuntimeError, match="no C\\+\\+ compiler 'no-such-compiler'"):
        native.build()


@needs_ninja
def test_a_folder_that_cannot_be_made_is_told_of_once(cache, monkeypatch):
    monkeypatch.setenv("CXX", sys.executable)  # there is such a program, and it is not asked
    cache.write_text("a file where a folder should be")
    mode, (said,) = searched()
    assert mode != "native"
    assert str(cache) in said
    assert searched() == (mode, [])


def test_turned_off_nothing_is_built_and_nothing_said(cache, monkeypatch):
    monkeypatch.setenv("TORCH_IVF_NATIVE", "0")
    assert searched()[1] == []
    assert library._library.build is None
    assert not cache.exists()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="nothing forks here")
def test_a_child_of_a_fork_waits_for_no_lock_of_its_parent(cache):
    with library._library.lock, warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # that other threads are running
        child = os.fork()
        if not child:
            os._exit(0 if library._library.lock.acquire(blocking=False) else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


@pytest.mark.skipif(not hasattr(os, "fork"), reason="nothing forks here")
@pytest.mark.parametrize("own", [0, 1, 2])
def test_a_child_of_a_fork_keeps_only_the_contexts_of_its_own_thread(cache, own, monkeypatch):
    monkeypatch.setenv("TORCH_IVF_NATIVE", "1")
    inside, over = threading.Event(), threading.Event()

    def other():
        with native.disabled(), native.disabled():
            inside.set()
            over.wait(60)

    thread = threading.Thread(target=other)
    thread.start()
    inside.wait(60)
    assert not native.enabled()
    with contextlib.ExitStack() as opened, warnings.catch_warnings():
        for _ in range(own):
            opened.enter_context(native.disabled())
        warnings.simplefilter("ignore", DeprecationWarning)  # that other threads are running
        child = os.fork()
        if not child:
            within = native.enabled()
            opened.close()
            os._exit(0 if (within, native.enabled()) == (own == 0, True) else 1)
    over.set()
    thread.join(60)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert native.enabled()


@needs_ninja
def test_a_compiler_that_refuses_is_asked_once(cache, compiler, monkeypatch):
    monkeypatch.setenv("CXX", compiler("echo 'it cannot be done' >&2; exit 1\n"))
    assert searched()[1] == []
    ended()
    mode, (said,) = searched()
    assert mode != "native"
    assert "build-native tries again" in said
    assert "it cannot be done" in next(cache.rglob("failed.txt")).read_text()
    assert searched() == (mode, [])
    monkeypatch.setattr(library, "_library", library._Library())  # as the next process
    (said,) = searched()[1]
    assert "an earlier build failed" in said
    assert library._library.build is None


@needs_kernel
@needs_ninja
def test_a_build_that_is_killed_leaves_nothing_in_the_way(cache, compiler, monkeypatch):
    monkeypatch.setenv("CXX", compiler("sleep 60\n"))
    assert searched()[1] == []
    while not list(cache.rglob("building-*/*")):
        time.sleep(0.05)
    assert searched()[1] == []  # while it is being built
    os.killpg(library._library.build.pid, signal.SIGKILL)
    ended()
    mode, (said,) = searched()
    assert mode != "native"
    assert "stopped" in said
    # Two at once after it: both get the kernel, and what the killed one left is gone.
    hands_over = compiler(f'sleep 1; case $out in *.so) cp "{BUILT}" "$out";; *) : > "$out";; esac\n')
    command = [sys.executable, "-m", "torch_ivf_module.native"]
    variables = {**os.environ, "CXX": hands_over}
    both = [subprocess.Popen(command, cwd=ROOT, env=variables, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    for one in both:
        said, _ = one.communicate(timeout=120)
        assert one.returncode == 0
        assert Path(said.strip()).read_bytes() == BUILT.read_bytes()
    assert not list(cache.rglob("building-*"))
