"""Short runs of the commands that damage files and kill writers, and faults that they must detect."""

from __future__ import annotations

import os
import random
import re
import signal
import time

import pytest

from tests import damaged_files, killed_writers
from torch_ivf_module import checkpoint

where_processes_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="writers are killed where processes fork")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    pytest.importorskip("faiss")
    folder = tmp_path_factory.mktemp("originals")
    damaged_files.originals(folder)
    return folder


def test_a_short_run_of_damaged_files_finds_nothing(folder, capsys):
    kinds = len(damaged_files.KINDS)
    assert damaged_files.main(["--count", str(4 * kinds), "--seed", "3"]) == 0
    said = capsys.readouterr().out
    found = re.fullmatch(
        r"(\d+) damaged files of (\d+) kinds: (\d+) refused, (\d+) equal .*, (\d+) sound, .* 0 failures\n", said
    )
    assert found, said
    total, of, refused, equal, sound = map(int, found.groups())
    assert (total, of) == (4 * kinds, kinds)
    assert refused + equal + sound <= total
    assert min(refused, equal, sound) > 0


def outcomes(folder, name, count=60):
    """What becomes of some damaged files of one kind, in this process."""
    kind = damaged_files.KINDS[name]
    expected = damaged_files.opened(folder / kind.file, kind)
    return [damaged_files.tried(name, expected, folder, random.Random(seed)) for seed in range(count)]


@pytest.mark.parametrize("name", ["ivf.pt mapped", "ivf.faiss"])
def test_another_index_without_an_error_is_detected(folder, name, monkeypatch):
    """Of a kind of file that has no checksums, as if it had some."""
    monkeypatch.setitem(damaged_files.KINDS, name, damaged_files.KINDS[name]._replace(checksums=True))
    found = outcomes(folder, name)
    assert any(outcome == damaged_files.FAILED and "in spite of its checksums" in about for outcome, about in found)


def test_an_error_that_does_not_name_the_file_is_detected(folder, monkeypatch):
    monkeypatch.setattr(checkpoint, "readable", lambda read, kind, text: read())
    assert damaged_files.FAILED in dict(outcomes(folder, "ivf.safetensors"))


def _crashes_and_hangs(folder, options, first, results):
    damaged_files.traced(folder)
    results.send(None)
    results.send((first, damaged_files.EQUAL, ""))
    if not first:
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(600)


@pytest.mark.long
@where_processes_fork
def test_crashes_and_hangs_are_detected(tmp_path, monkeypatch):
    monkeypatch.setattr(damaged_files, "work", _crashes_and_hangs)
    monkeypatch.setattr(damaged_files, "SECONDS", 5)
    found = list(damaged_files.outcomes(tmp_path, damaged_files.parsed(["--count", "4"])))
    good, bad = damaged_files.EQUAL, damaged_files.FAILED
    assert [(number, outcome) for number, outcome, _ in found] == [(0, good), (1, bad), (2, good), (3, bad)]
    assert "ended with -9" in found[1][2]
    assert re.search(r"hangs(.|\n)*_crashes_and_hangs", found[3][2])


# --- killed writers -----------------------------------------------------------------------------------------


@where_processes_fork
def test_a_short_run_of_killed_writers_finds_nothing(folder, capsys):
    assert killed_writers.main(["--count", "30"]) == 0
    said = capsys.readouterr().out
    assert re.fullmatch(r"30 killed writers \(.*\): .*, 0 failures\n", said), said


def _in_place(path, write, suffix=""):
    write(str(path))
    content = path.read_bytes()
    path.write_bytes(content[:1000])
    time.sleep(0.05)
    path.write_bytes(content)


def _beside(path, write, suffix=""):
    part = path.with_name("temporary" + path.suffix)
    write(str(part))
    time.sleep(0.05)
    part.replace(path)


@where_processes_fork
@pytest.mark.parametrize("replace", [_in_place, _beside])
def test_writers_that_are_not_careful_are_detected(folder, monkeypatch, capsys, replace):
    monkeypatch.setattr(checkpoint, "replace", replace)
    assert killed_writers.main(["--count", "24"]) == 1
    assert re.search(r"[1-9]\d* failures\n$", capsys.readouterr().out)
