"""Writers that are killed, concurrent writers, files with inconsistent or malicious contents, files of a gigabyte."""

from __future__ import annotations

import errno
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.datasets import normal
from tests.states import same_state, snapshot
from torch_ivf_module import IndexFlatL2, IndexIVFFlat, IndexPreTransform, _files, load
from torch_ivf_module import checkpoint as files

# Saves two indexes alternately without end, and prints a line after the first save. All entries of an index are equal.
WRITER = """
import sys, torch
from torch_ivf_module import IndexFlatL2
indexes = []
for number in (1.0, 2.0):
    index = IndexFlatL2(64)
    index.add(torch.full((int(10_000 * number), 64), number))
    indexes.append(index)
indexes[0].save(sys.argv[1])
print("begun", flush=True)
while True:
    for index in reversed(indexes):
        index.save(sys.argv[1])
"""


# Files of torch and of safetensors are written by the same steps, so usually one of them is tested.
either_suffix = pytest.mark.parametrize("suffix", [pytest.param(".pt", marks=pytest.mark.long), ".safetensors"])


@either_suffix
def test_a_writer_killed_at_any_moment_leaves_a_complete_file(suffix, tmp_path):
    path = tmp_path / f"index{suffix}"
    moments = random.Random(5)
    seen = set()
    for _ in range(2):
        with subprocess.Popen([sys.executable, "-c", WRITER, str(path)], stdout=subprocess.PIPE, text=True) as writer:
            try:
                assert writer.stdout.readline() == "begun\n"
                for mmap in (False, True) * 4:  # while the file is being replaced
                    index = load(path, mmap=mmap)
                    assert index.packed_embeddings.unique().tolist() == [index.ntotal / 10_000]
                    seen.add(index.ntotal)
                time.sleep(moments.uniform(0, 0.1))
            finally:
                writer.kill()
        index = load(path)
        assert index.packed_embeddings.unique().tolist() == [index.ntotal / 10_000]
    assert seen == {10_000, 20_000}, "both were seen"
    index.save(path)  # removes the temporary files of the killed writer
    assert list(tmp_path.iterdir()) == [path]
    assert load(path).ntotal == index.ntotal


# Writes half of a file, prints a line, and finishes when its input is closed.
HALFWAY = """
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[2])
import _files  # without the package, whose import takes longer than the test

def write(part):
    Path(part).write_text("half of it")
    Path(part).with_name("besides").write_text("what some libraries write for a moment")
    print("begun", flush=True)
    sys.stdin.read()

_files.replace(Path(sys.argv[1]), write)
"""


@contextmanager
def halfway(path):
    """A process that has written half of `path`."""
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    command = [sys.executable, "-c", HALFWAY, str(path), str(Path(_files.__file__).parent)]
    with subprocess.Popen(command, **pipes) as writer:
        try:
            assert writer.stdout.readline() == "begun\n"
            yield writer
        finally:
            writer.kill()


def parts(folder) -> list[Path]:
    """The temporary folders of writers."""
    return [file for file in folder.iterdir() if file.name.startswith(".")]


def test_the_next_save_removes_temporary_files_of_killed_writers(tmp_path):
    path, other = tmp_path / "index.pt", tmp_path / "index.pt.old"
    index = trained()
    with halfway(path) as dead, halfway(other), halfway(path) as alive:
        dead.kill()
        dead.wait()
        assert len(parts(tmp_path)) == 3
        index.save(path)
        assert len(parts(tmp_path)) == 2, "that of the running writer, and that of another name"
        alive.communicate("")
        assert path.read_text() == "half of it", "the last writer replaces the file"
    assert len(parts(tmp_path)) == 1
    index.save(other)
    assert parts(tmp_path) == []
    assert load(other).ntotal == index.ntotal


def test_temporary_files_of_another_machine_are_removed_after_a_day(tmp_path, monkeypatch):
    path = tmp_path / "index.pt"
    index = trained()
    with halfway(path) as writer:
        monkeypatch.setattr(_files, "_machine", lambda: "another0")
        part = parts(tmp_path)[0]
        long_ago = time.time() - 25 * 3600
        old = [part, *part.iterdir()]
        for file in old:
            os.utime(file, (long_ago, long_ago))
        index.save(path)
        assert parts(tmp_path) == [part], "it is locked"
        writer.kill()
        writer.wait()
        os.utime(part / "lock")
        index.save(path)
        assert parts(tmp_path) == [part], "its lock file is new"
        os.utime(part / "lock", (long_ago, long_ago))
        index.save(path)
        assert parts(tmp_path) == []


def test_without_locks_no_temporary_file_is_removed(tmp_path, monkeypatch):
    path = tmp_path / "index.pt"
    with halfway(path):
        pass

    def refused(handle, how):
        raise OSError(errno.ENOLCK, "no locks available")

    monkeypatch.setattr(_files.fcntl, "flock", refused)
    trained().save(path)
    assert len(parts(tmp_path)) == 1
    monkeypatch.setattr(_files, "fcntl", None)
    trained().save(path)
    assert len(parts(tmp_path)) == 1
    monkeypatch.undo()
    trained().save(path)
    assert parts(tmp_path) == []


def test_a_temporary_folder_without_a_lock_file_is_removed_too(tmp_path):
    path = tmp_path / "index.pt"
    early = tmp_path / f".index.pt.{_files._machine()}.abcd_123.part"
    early.mkdir()
    beside = tmp_path / ".index.pt.notes"  # not a temporary folder
    beside.mkdir()
    trained().save(path)
    assert parts(tmp_path) == [beside]


LONGEST = 255  # bytes of a name, on most file systems
LONG_NAMES = {
    "stem": ("a" * (LONGEST - 3), ".pt"),
    "suffix": ("a", ".pt" + "b" * (LONGEST - 4)),
    "of several bytes each": ("a" + "\N{GREEK SMALL LETTER PHI}" * ((LONGEST - 4) // 2), ".pt"),
    "no text": ("a" + "\udcff" * (LONGEST - 16), ".safetensors"),  # bytes that are not UTF-8
}


@pytest.mark.parametrize("kind", LONG_NAMES)
def test_the_longest_names(kind, tmp_path):
    stem, suffix = LONG_NAMES[kind]
    path, other = tmp_path / (stem + suffix), tmp_path / (stem[:-1] + "b" + suffix)
    assert len(os.fsencode(path.name)) > LONGEST - 6
    _files.replace(path, lambda part: Path(part).write_text("first"))
    for name in (path.name, other.name):
        (tmp_path / f".{_files.short_name(name)}.{_files._machine()}.abcd_123.part").mkdir()
    assert len(parts(tmp_path)) == 2
    _files.replace(path, lambda part: Path(part).write_text("second"))
    assert path.read_text() == "second"
    assert len(parts(tmp_path)) == 1, "that of another name with the same beginning remains"
    _files.replace(other, lambda part: Path(part).write_text("third"))
    assert parts(tmp_path) == []


def test_an_index_under_the_longest_name(tmp_path):
    for suffix in (".pt", ".safetensors"):
        path = tmp_path / ("a" * (LONGEST - len(suffix)) + suffix)
        trained().save(path)
        assert load(path).ntotal == 200


def test_a_folder_removed_before_it_is_locked_is_created_again(tmp_path, monkeypatch):
    """Another writer removes the folder, once before its lock file exists, once before it is locked."""
    made, lock = tempfile.mkdtemp, _files._lock
    moments = []

    def made_and_seen(**settings):
        folder = made(**settings)
        if not moments:
            moments.append("empty")
            _files._sweep(tmp_path / "index.pt")
        return folder

    def seen_and_locked(handle, *, wait=False):
        if wait and moments == ["empty"]:
            moments.append("not locked")
            _files._sweep(tmp_path / "index.pt")
        return lock(handle, wait=wait)

    monkeypatch.setattr(_files.tempfile, "mkdtemp", made_and_seen)
    monkeypatch.setattr(_files, "_lock", seen_and_locked)
    trained().save(tmp_path / "index.pt")
    assert moments == ["empty", "not locked"]
    assert list(tmp_path.iterdir()) == [tmp_path / "index.pt"]
    assert load(tmp_path / "index.pt").ntotal == 200


def test_many_savers_at_once(tmp_path):
    indexes = [trained() for _ in range(4)]
    for number, index in enumerate(indexes):
        index.remove_ids(torch.arange(number))
    with ThreadPoolExecutor(4) as pool:
        for done in [pool.submit(index.save, tmp_path / "index.pt") for index in indexes * 10]:
            done.result()
    assert list(tmp_path.iterdir()) == [tmp_path / "index.pt"]
    assert load(tmp_path / "index.pt").ntotal in {200, 199, 198, 197}


def test_saving_to_a_link_replaces_the_file_it_points_to(tmp_path):
    index = trained()
    index.save(tmp_path / "real.pt")
    (tmp_path / "link.pt").symlink_to(tmp_path / "real.pt")
    index.remove_ids(torch.arange(100))
    index.save(tmp_path / "link.pt")
    assert (tmp_path / "link.pt").is_symlink()
    assert load(tmp_path / "real.pt").ntotal == 100


def test_errors_of_writing_name_the_file(tmp_path, monkeypatch):
    index = trained()
    with pytest.raises(FileNotFoundError, match="no such folder"):
        index.save(tmp_path / "nowhere" / "index.pt")
    with pytest.raises(IsADirectoryError, match="is a folder"):
        index.save(tmp_path)
    with pytest.raises(IsADirectoryError, match="from_pretrained"):
        load(tmp_path)

    def full(*args, **settings):
        raise RuntimeError("unexpected pos 64 vs 0")  # torch's error for a full disk

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(OSError, match=r"index\.pt cannot be written"):
        index.save(tmp_path / "index.pt")
    assert list(tmp_path.iterdir()) == []


def test_views_are_written_without_their_base(tmp_path):
    index = IndexFlatL2(8)
    rows = torch.randn(100_000, 8)[:50]
    state = dict(index.state_dict(), packed_embeddings=rows, list_offsets=torch.tensor([0, 50]))
    index.load_state_dict({**state, "list_ids": torch.arange(50)}, assign=True)
    index.save(tmp_path / "index.pt")
    assert (tmp_path / "index.pt").stat().st_size < 10_000


def test_a_column_of_one_row_is_written(tmp_path):
    """It counts as contiguous whatever its stride."""
    index, pair = IndexFlatL2(8), torch.tensor([[7, 5]])
    rows = dict(packed_embeddings=torch.ones(1, 8), list_offsets=torch.tensor([0, 1]), list_ids=pair[:, 0])
    index.load_state_dict({**index.state_dict(), **rows}, assign=True)
    index.save(tmp_path / "index.pt")
    assert load(tmp_path / "index.pt").list_ids.tolist() == [7]
    index.add(torch.ones(1, 8) * 2, groups=torch.tensor([3]))
    index.remove_ids([7])
    index.save(tmp_path / "index.pt")
    assert load(tmp_path / "index.pt").list_groups.tolist() == [3]


# --- malicious files ----------------------------------------------------------------------------------------


def trained() -> IndexIVFFlat:
    index = IndexIVFFlat(6, nlist=4, nprobe=2)
    index.train(normal(200, 6)).add(normal(200, 6))
    return index


def forge(path, **wrong) -> None:
    """Write a file with valid checksums, but with some tensors or settings replaced."""
    index = trained()
    header = {"format": files.FORMAT, "version": files.VERSION, "needs": files.NEEDS, **files.description(index)}
    tensors = dict(index.state_dict())
    for name, value in wrong.items():
        if name in header:
            header[name] = value
        elif name in header["config"]:
            header["config"][name] = value
        else:
            tensors[name] = value
    tensors = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    header["digests"] = {name: files._digest(tensor.contiguous()) for name, tensor in tensors.items()}
    header["digest"] = files._digest_of(header)
    if path.suffix == ".pt":
        torch.save({**header, "state": tensors}, path)
    else:
        words = {key: json.dumps(value) for key, value in header.items()}
        pytest.importorskip("safetensors.torch").save_file(tensors, path, metadata=words)


LAST = 2**62
HOSTILE = {
    "offsets out of order": dict(list_offsets=torch.tensor([0, 100, 50, 150, 200])),
    "offsets below zero": dict(list_offsets=torch.tensor([0, -5, 50, 150, 200])),
    "offsets beyond the end": dict(list_offsets=torch.tensor([0, 50, 100, 150, LAST])),
    "offsets that begin late": dict(list_offsets=torch.tensor([1, 50, 100, 150, 200])),
    "too few offsets": dict(list_offsets=torch.tensor([0, 100, 200])),
    "floats for offsets": dict(list_offsets=torch.tensor([0.0, 50, 100, 150, 200])),
    "too few ids": dict(list_ids=torch.arange(100)),
    "narrow ids": dict(list_ids=torch.arange(200, dtype=torch.int32)),
    "floats for ids": dict(list_ids=torch.arange(200).float()),
    "ids that mean padding": dict(list_ids=torch.full((200,), -1)),
    "integers for vectors": dict(packed_embeddings=torch.ones(200, 6, dtype=torch.int64)),
    "vectors of another dimension": dict(packed_embeddings=torch.ones(200, 5)),
    "a vector for vectors": dict(packed_embeddings=torch.ones(1200)),
    "vectors that are no numbers": dict(packed_embeddings=torch.full((200, 6), torch.inf)),
    "centroids that are no numbers": dict(centroids=torch.full((4, 6), torch.nan)),
    "a next id below zero": dict(next_id=torch.tensor(-3)),
    "several next ids": dict(next_id=torch.arange(3)),
    "no vectors at all": dict(packed_embeddings=None),
    "a tensor too many": dict(extra=torch.ones(2)),
    "a dimension below zero": {"d": -6},
    "a dimension that is no number": {"d": "six"},
    "lists below zero": {"nlist": -4},
    "a huge number of lists that are not there": {"nlist": LAST},
    "another metric": {"metric": "manhattan"},
    "a dtype that is code": {"dtype": "load"},
    "another class": {"class": "Popen"},
    "a class that is not named": {"class": ["IndexIVFFlat"]},
    "no settings": {"config": None},
    "settings there are not": {"config": {"d": 6, "dtype": "float32", "hook": "os.system"}},
    "a version below zero": {"version": -1},
    "a version that is a word": {"version": "1"},
    "no version": {"version": None},
}


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
@pytest.mark.parametrize("kind", HOSTILE)
@pytest.mark.parametrize("mmap", [False, True])
def test_a_file_that_does_not_fit_together_is_refused(kind, suffix, mmap, tmp_path):
    path = tmp_path / f"index{suffix}"
    forge(path, **HOSTILE[kind])
    if kind == "a huge number of lists that are not there":  # nlist is not used once the index is trained
        assert load(path, mmap=mmap).nlist == 4
        return
    if kind == "vectors that are no numbers" and mmap:  # vectors of a mapped file are not read
        return
    with pytest.raises(ValueError, match=path.name):
        load(path, mmap=mmap)


def test_a_hand_made_correct_file_loads(tmp_path):
    forge(tmp_path / "index.pt")
    assert same_state(snapshot(load(tmp_path / "index.pt")), snapshot(trained()))


def test_a_transform_inside_a_transform_is_refused(tmp_path):
    index = IndexPreTransform(6, torch.nn.Linear(6, 3), IndexFlatL2(3))
    header = files.description(index)
    header["config"]["index"] = files.description(index)
    with pytest.raises(TypeError, match="within"):
        files.rebuilt(header)
    index.save(tmp_path / "index.pt")
    content = torch.load(tmp_path / "index.pt", weights_only=True)
    content["config"]["steps"] = [[6, 2**40, True]]
    content["digest"] = files._digest_of(content)
    torch.save(content, tmp_path / "index.pt")
    with pytest.raises(ValueError, match=r"index\.pt"):
        load(tmp_path / "index.pt")


def test_the_error_for_a_file_of_a_later_release_names_the_release(tmp_path):
    forge(tmp_path / "index.pt", version=7, needs="3.2.0")
    with pytest.raises(ValueError, match=r"up to 1; it needs torch_ivf_module 3\.2\.0 or newer"):
        load(tmp_path / "index.pt")


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_a_flipped_bit_anywhere_is_refused_or_harmless(suffix, tmp_path):
    """Either the file is refused, or the bit has no meaning and the index is equal."""
    path = tmp_path / f"index{suffix}"
    index = trained()
    index.save(path)
    content = path.read_bytes()
    places = random.Random(11)
    refused = 0
    for _ in range(150):
        damaged = bytearray(content)
        damaged[places.randrange(len(content))] ^= 1 << places.randrange(8)
        path.write_bytes(damaged)
        try:
            loaded = load(path)
        except ValueError:
            refused += 1
        else:
            assert same_state(snapshot(loaded), snapshot(index))
    assert refused > 100


# --- large --------------------------------------------------------------------------------------------------

# Opens and searches a mapped file in a new process, and prints the time and the growth of resident memory.
READER = """
import sys, time, psutil, torch
from torch_ivf_module import load
load(sys.argv[2], mmap=True)  # imports what the first call imports
me = psutil.Process()
before, start = me.memory_info().rss, time.perf_counter()
index = load(sys.argv[1], mmap=True)
seconds, grown = time.perf_counter() - start, me.memory_info().rss - before
D, I = index.search(torch.zeros(1, index.d) + 3, 2)
print(index.ntotal, seconds, grown, *I.flatten().tolist())
"""


@either_suffix
def test_mmap_opens_a_gigabyte_without_reading_it(suffix, tmp_path):
    """A sparse file: all vectors but two are zero."""
    pytest.importorskip("psutil")
    rows, d = 1_000_000, 256
    index = IndexFlatL2(d, dtype=torch.float32)
    state = {**index.state_dict(), "packed_embeddings": _sparse(tmp_path / "vectors", rows, d)}
    state.update(list_offsets=torch.tensor([0, rows]), list_ids=torch.arange(rows), next_id=torch.tensor(rows))
    state["packed_embeddings"][777_777] = 3
    state["packed_embeddings"][3] = 2.9
    index.load_state_dict(state, assign=True)
    path, small = tmp_path / f"index{suffix}", tmp_path / f"small{suffix}"
    index.save(path)
    IndexFlatL2(d).save(small)
    done = subprocess.run([sys.executable, "-c", READER, path, small], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    ntotal, _, grown, *ids = done.stdout.split()
    assert (int(ntotal), ids) == (rows, ["777777", "3"])
    assert int(grown) < 64 << 20, "resident memory after opening a gigabyte"


def _sparse(path, rows, d):
    return torch.from_numpy(np.memmap(path, np.float32, "w+", shape=(rows, d)))
