"""Which kernel is loaded, and compiling one: whatever goes wrong, searches are answered, by PyTorch operations.

A build here takes a compiler that is quick: a script that hands over the kernel that is there already, or refuses.
Without that one, as on a machine without a compiler, the tests that need it are skipped. A process loads one kernel, so
what loads another runs in a process of its own.
"""

from __future__ import annotations

import contextlib
import os
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

ROOT = Path(__file__).parent.parent
FILE = native.info()["file"]  # before a test moves the folder
needs_kernel = pytest.mark.skipif(FILE is None, reason="no kernel: python -m torch_ivf_module build-native")
HANDS_OVER = f'case "$*" in *-shared*) cp "{FILE}" "$out";; *) : > "$out";; esac\n'


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """A process that knows of no kernel yet, and an empty folder for one."""
    folder = tmp_path / "cache"
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(folder))
    monkeypatch.setattr(library, "PACKAGED", tmp_path / "nothing.so")
    monkeypatch.setattr(library, "_library", library._Library())
    monkeypatch.setattr(library._library, "switched_off", False)
    return folder


@pytest.fixture
def compiler(tmp_path):
    """Make a C++ compiler of a shell script; $out is the file it is asked for."""

    def make(body):
        path = tmp_path / "bin" / "c++"
        path.parent.mkdir(exist_ok=True)
        path.write_text(
            '#!/bin/sh\n[ "$1" = -dumpmachine ] && { echo some-machine; exit 0; }\n'
            'out=; before=; for word in "$@"; do [ "$before" = -o ] && out=$word; before=$word; done\n' + body
        )
        path.chmod(path.stat().st_mode | stat.S_IXUSR)
        return str(path)

    return make


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


def said(code, **variables):
    """What a process that runs `code` prints. It has loaded no kernel before."""
    setting = (
        "import os\n"
        "os.environ['TORCH_IVF_NATIVE'] = '0'\n"
        "from tests.test_native_build import *\n"
        "library._library.switched_off = False\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", setting + code],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), **variables},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


@needs_kernel
def test_it_is_compiled_once_and_later_processes_load_it(tmp_path, compiler):
    variables = {"TORCH_EXTENSIONS_DIR": str(tmp_path / "cache"), "CXX": compiler(HANDS_OVER)}
    code = "library.PACKAGED = Path('nothing')\n"
    file = said(code + "print(searched()[1], native.build())\nprint(searched())", **variables)
    assert file[0].startswith("[] ")
    assert file[1] == "('native', [])"
    built = [path.name for path in (tmp_path / "cache" / "torch_ivf_module").rglob("*") if path.is_file()]
    assert sorted(built) == ["kernel.so", "lock"]
    variables["CXX"] = "no-such-compiler"  # none is needed any more
    assert said(code + "print(searched(), native.build())", **variables)[0].startswith("('native', []) ")


@needs_kernel
def test_the_packaged_one_comes_first_unless_it_cannot_be_loaded(tmp_path, compiler):
    variables = {"TORCH_EXTENSIONS_DIR": str(tmp_path / "cache"), "CXX": compiler(HANDS_OVER)}
    packaged = tmp_path / "_kernel.so"
    code = f"library.PACKAGED = Path('{packaged}')\n"
    packaged.write_bytes(b"not a library")
    lines = said(code + "print(*searched()[1])\nprint(native.build())\nprint(searched())", **variables)
    assert str(packaged) in lines[0]
    assert lines[1].startswith(str(tmp_path / "cache"))
    assert lines[2] == "('native', [])"
    packaged.write_bytes(Path(FILE).read_bytes())
    assert said(code + "print(native.info()['file'])", **variables) == [str(packaged)]


def test_a_search_starts_no_compiler_and_says_nothing(cache, compiler, monkeypatch, tmp_path):
    monkeypatch.setenv("CXX", compiler(f": > {tmp_path / 'asked'}\n"))
    mode, told = searched()
    assert mode != "native"
    assert told == []
    assert "build-native" in native.info()["why_not"]
    assert not (tmp_path / "asked").exists()
    assert not cache.exists()


def test_a_file_that_is_no_library_is_told_of_once(cache):
    file = library.kernel_file()
    file.parent.mkdir(parents=True)
    file.write_bytes(b"not a library")
    mode, (told,) = searched()
    assert mode != "native"
    assert "build-native --again" in told
    assert native.info()["why_not"] in told
    assert searched() == (mode, [])


def test_without_a_compiler_a_build_says_what_to_install(cache, monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(RuntimeError, match=r"no C\+\+ compiler 'no-such-compiler': install g\+\+ or clang"):
        native.build()


def test_a_folder_that_cannot_be_made_is_named(cache, compiler, monkeypatch):
    monkeypatch.setenv("CXX", compiler(""))
    cache.write_text("a file where a folder should be")
    with pytest.raises(RuntimeError, match=str(cache)):
        native.build()
    assert searched()[1] == []


def test_turned_off_nothing_is_loaded_and_nothing_said(cache, monkeypatch):
    monkeypatch.setattr(library._library, "switched_off", True)
    assert searched()[1] == []
    assert native.info() == {"available": False, "file": None, "isa": None, "why_not": "it is turned off"}


def test_a_compiler_that_refuses_is_quoted(cache, compiler, monkeypatch):
    monkeypatch.setenv("CXX", compiler("echo 'it cannot be done' >&2; exit 1\n"))
    with pytest.raises(RuntimeError, match=r"(?s)refused the kernel:.*it cannot be done"):
        native.build()
    assert [path.name for path in cache.rglob("*") if path.is_file()] == ["lock"]
    assert searched()[1] == []


@pytest.mark.parametrize("version", [(2, 9), (2, 10)])
def test_the_headers_that_a_build_takes(compiler, version, monkeypatch, tmp_path):
    """torch 2.9 has no such library.h where it is looked for; from 2.10 on it is there."""
    monkeypatch.setenv("CXX", compiler(': > "$out"\n'))
    folder = tmp_path / "torch"
    if version >= (2, 10):
        header = folder / "include" / "torch" / "csrc" / "stable" / "library.h"
        header.parent.mkdir(parents=True)
        header.touch()
        library.compile_kernel(tmp_path / "kernel.so", folder)
        assert (tmp_path / "kernel.so").exists()
        return
    with pytest.raises(RuntimeError, match=r"needs torch 2\.10 or later"):
        library.compile_kernel(tmp_path / "kernel.so", folder)


@needs_kernel
def test_a_build_that_is_killed_leaves_nothing_in_the_way(cache, compiler, tmp_path):
    build = "from torch_ivf_module.native import library as l; l.PACKAGED = l.SOURCES / 'nothing'; print(l.build())"
    command = [sys.executable, "-c", build]
    variables = {**os.environ, "PYTHONPATH": str(ROOT), "CXX": compiler("sleep 60\n")}
    killed = subprocess.Popen(command, env=variables, start_new_session=True)
    while not list(cache.rglob("building-*")):
        time.sleep(0.05)
    os.killpg(killed.pid, signal.SIGKILL)
    killed.wait(60)
    # Two at once after it: both get the kernel, and what the killed one left is gone.
    variables["CXX"] = compiler("sleep 0.3; " + HANDS_OVER)
    both = [subprocess.Popen(command, env=variables, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    for one in both:
        file, _ = one.communicate(timeout=120)
        assert one.returncode == 0
        assert Path(file.strip()).read_bytes() == Path(FILE).read_bytes()
    assert not list(cache.rglob("building-*"))


@needs_kernel
def test_an_instruction_set_that_is_not_there_is_refused():
    code = "try: native.available()\nexcept RuntimeError as error: print(error)"
    (told,) = said(code, TORCH_IVF_NATIVE_ISA="mmx")
    assert "TORCH_IVF_NATIVE_ISA must be one that this CPU and this kernel have, got mmx; it has" in told
    assert "baseline" in told


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
    monkeypatch.setattr(library._library, "switched_off", False)
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
