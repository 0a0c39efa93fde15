"""A file that is larger than the memory that a process may use, searched by codes; a short run of the command."""

from __future__ import annotations

import re
import subprocess
import sys

import pytest

from tests import larger_than_memory
from torch_ivf_module import native

pytestmark = [
    pytest.mark.skipif(sys.platform != "linux", reason="it reads /proc"),
    pytest.mark.skipif(not native.available(), reason="codes are for the kernel"),
]


def run(program: str, *options: str) -> str:
    command = [sys.executable, "-m", f"tests.{program}", "--no-cgroup", "--queries=20", *options]
    done = subprocess.run(command, cwd=larger_than_memory.ROOT, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_a_file_larger_than_the_memory(tmp_path):
    printed = run("larger_than_memory", "--gigabytes=0.13", "--d=256", "--spare=16", f"--folder={tmp_path}")
    rows, needed, allowed = (
        int(size) for size in re.search(r"rows (\d+) MB .* lists (\d+) MB; .* use (\d+) MB beyond", printed).groups()
    )
    assert allowed < 0.55 * rows
    grown = int(re.search(r"(\d+) MB more than before", printed)[1])
    assert needed - 16 < grown <= allowed
    assert "80 answers equal those of the index in memory without codes" in printed
    scored = [int(count) for count in re.findall(r"probed lists (\d+) are read", printed)]
    assert len(scored) == 4
    assert max(scored) < 100
    assert list(tmp_path.iterdir()) == []


def test_an_index_built_from_a_file_larger_than_the_memory(tmp_path):
    # What is spare is for address space that allocators reserve and do not use: it is limited too without a cgroup.
    options = ("--gigabytes=0.3", "--d=256", "--memory=64", "--spare=64", f"--folder={tmp_path}")
    printed = run("build_larger_than_memory", *options)
    assert "vectors 300 MB; 1 process(es) may use 128 MB beyond" in printed
    assert int(re.search(r"RssAnon at most (\d+) MB more than before", printed)[1]) <= 64
    assert "false" not in re.search("tensors equal to those of the index built in memory: (.*)", printed)[1]
    assert "80 answers equal those of the index in memory without codes" in printed
    assert list(tmp_path.iterdir()) == []
