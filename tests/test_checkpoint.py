"""Saving and loading in both formats: damaged and foreign files are refused, and a file is replaced atomically."""

from __future__ import annotations

import os
import pickle
from pathlib import Path

import pytest
import torch

from tests.datasets import PLAIN, normal
from tests.oracle import agree
from tests.problems import few_training_rows, flat, shared
from tests.states import same_state, settings_of, snapshot
from torch_ivf_module import IndexFlatIP, IndexFlatL2, IndexIVFFlat, load

SUFFIXES = [".pt", ".safetensors"]
KINDS = {
    "l2": lambda: shared(PLAIN, "l2"),
    "ip, float16": lambda: shared(PLAIN, "ip", torch.float16),
    "cosine, bfloat16": lambda: shared(PLAIN, "cosine", torch.bfloat16),
    "flat l2": lambda: flat(PLAIN, "l2"),
    "flat ip": lambda: flat(PLAIN, "ip", torch.float16),
}
each_kind = pytest.mark.parametrize("kind", KINDS)


@pytest.fixture(params=SUFFIXES)
def path(request, tmp_path):
    if request.param == ".safetensors":
        pytest.importorskip("safetensors")
    return tmp_path / f"index{request.param}"


@each_kind
@pytest.mark.parametrize("mmap", [False, True])
def test_save_and_load(kind, mmap, path):
    index, base, queries = KINDS[kind]()
    index.remove_ids(torch.arange(7))
    index.k, index.search_mode, index.max_bytes = 4, "matrix", 1 << 20
    if isinstance(index, IndexIVFFlat):
        index.nprobe, index.max_codes = 3, 120
    index.add(base[:3])
    index.save(path)
    loaded = load(path, mmap=mmap)
    assert type(loaded) is type(index)
    assert settings_of(loaded) == settings_of(index)
    assert loaded.packed_embeddings.dtype == index.packed_embeddings.dtype
    assert same_state(snapshot(loaded), snapshot(index))
    agree(loaded.search(queries, 9), index.search(queries, 9), rtol=1e-6, atol=1e-6)
    before = path.read_bytes()
    loaded.add(base[:4])
    loaded.update(torch.tensor([20]), base[:1])
    loaded.remove_ids(torch.arange(30))
    assert int(loaded.next_id) == index.ntotal + 7 + 4
    loaded.reset()
    assert path.read_bytes() == before
    assert int(loaded.next_id) == 0


@pytest.mark.parametrize("make", [lambda: IndexIVFFlat(5, nlist=3, nprobe=2), lambda: IndexFlatL2(5),
                                  lambda: IndexFlatIP(5)])  # fmt: skip
def test_save_and_load_an_empty_index(make, path):
    index = make()
    index.save(path)
    loaded = load(path)
    assert settings_of(loaded) == settings_of(index)
    assert same_state(snapshot(loaded), snapshot(index))
    with few_training_rows():
        loaded.train(normal(60, 5))
    loaded.add(normal(60, 5))
    assert loaded.ntotal == 60


def test_the_torch_file_opens_with_weights_only(tmp_path):
    index, _, _ = shared()
    index.save(tmp_path / "index.pt")
    content = torch.load(tmp_path / "index.pt", weights_only=True)
    tensors = [value for value in _leaves(content) if isinstance(value, torch.Tensor)]
    assert len(tensors) == 5


def _leaves(value):
    if isinstance(value, dict):
        for part in value.values():
            yield from _leaves(part)
    else:
        yield value


def test_the_safetensors_file_contains_the_buffers(tmp_path):
    library = pytest.importorskip("safetensors.torch")
    index, _, _ = shared()
    index.save(tmp_path / "index.safetensors")
    assert same_state(library.load_file(tmp_path / "index.safetensors"), snapshot(index))


def test_paths_may_be_strings(path):
    index, _, _ = shared()
    index.save(str(path))
    assert load(str(path)).ntotal == index.ntotal


def test_loading_onto_a_device(path):
    index, _, _ = shared()
    index.save(path)
    assert load(path, device="cpu").centroids.device == torch.device("cpu")


def test_derived_data_is_not_saved(path):
    index, _, queries = shared()
    index.save(path)
    size = path.stat().st_size
    index.search(queries, 5)
    index.range_search(queries, 5.0)
    index.save(path)
    assert path.stat().st_size == size
    assert size < sum(tensor.nbytes for tensor in index.state_dict().values()) + 8192


# --- damage -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("part", [0, 1, 7, 8, 100, 0.3, 0.6, 0.9, -1])
@pytest.mark.parametrize("mmap", [False, True])
def test_a_truncated_file_is_refused(part, mmap, path):
    index, _, _ = shared()
    index.save(path)
    content = path.read_bytes()
    path.write_bytes(content[: int(part * len(content)) if isinstance(part, float) else part])
    with pytest.raises(ValueError, match=path.name):
        load(path, mmap=mmap)


@pytest.mark.parametrize("name", ["centroids", "packed_embeddings", "list_offsets", "list_ids"])
def test_an_altered_tensor_is_refused(name, path):
    """One changed bit, such that the shapes and offsets of the state are still consistent."""
    index, _, _ = shared()
    index.save(path)
    content = bytearray(path.read_bytes())
    wanted = bytes(index.state_dict()[name].contiguous().view(torch.uint8).numpy().tobytes())
    at = content.find(wanted)
    assert at > 0
    content[at + (8 * 3 if name == "list_offsets" else 0)] ^= 1
    path.write_bytes(content)
    with pytest.raises(ValueError, match=path.name):
        load(path)


@pytest.mark.parametrize("place", range(12))
def test_a_file_altered_anywhere_is_refused_or_loads_correctly(place, path):
    """A change of a byte that matters (not padding or a date) must not give an index."""
    index, _, _ = shared()
    index.save(path)
    content = bytearray(path.read_bytes())
    # At the start, in the middle and at the end of the file.
    at = [2, 12, 40, 75, 150, 300, len(content) // 3, len(content) // 2, -700, -120, -60, -20][place]
    content[at] ^= 0x55
    path.write_bytes(content)
    try:
        loaded = load(path)
    except ValueError as error:
        assert path.name in str(error)  # noqa: PT017
    else:
        assert settings_of(loaded) == settings_of(index)
        assert same_state(snapshot(loaded), snapshot(index))


def test_a_file_without_an_index_is_refused(tmp_path, path):
    if path.suffix == ".pt":
        torch.save({"weight": torch.ones(3)}, path)
    else:
        import safetensors.torch

        safetensors.torch.save_file({"weight": torch.ones(3)}, path)
    with pytest.raises(ValueError, match=path.name):
        load(path)


def test_a_file_of_a_later_release_is_refused(tmp_path):
    index, _, _ = shared()
    index.save(tmp_path / "index.pt")
    content = torch.load(tmp_path / "index.pt", weights_only=True)
    content["version"] = 1000
    torch.save(content, tmp_path / "index.pt")
    with pytest.raises(ValueError, match="1000"):
        load(tmp_path / "index.pt")


class Evil:
    def __reduce__(self):
        return os.mkdir, ("executed",)


def test_nothing_in_a_file_is_executed(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"format": "torch_ivf_module", "version": 1, "state": Evil()}, tmp_path / "index.pt")
    with pytest.raises(ValueError, match=r"index\.pt"):
        load(tmp_path / "index.pt")
    (tmp_path / "plain.pt").write_bytes(pickle.dumps(Evil()))
    with pytest.raises(ValueError, match=r"plain\.pt"):
        load(tmp_path / "plain.pt")
    assert not (tmp_path / "executed").exists()


def test_a_missing_file(path):
    with pytest.raises(FileNotFoundError, match=path.name):
        load(path)


def test_a_missing_folder(path):
    index, _, _ = shared()
    with pytest.raises(FileNotFoundError):
        index.save(path.parent / "nowhere" / path.name)


# --- atomic writing -----------------------------------------------------------------------------------------


def test_no_other_file_is_left(path):
    index, _, _ = shared()
    index.save(path)
    index.save(path)
    assert [file.name for file in path.parent.iterdir()] == [path.name]


@pytest.mark.parametrize("step", ["replace", "fsync"])
def test_a_failure_while_saving_leaves_the_old_file(step, path, monkeypatch):
    index, base, _ = shared()
    index.save(path)
    before = path.read_bytes()
    index.add(base)

    def fail(*args):
        raise OSError("disk full")

    with monkeypatch.context() as patch:
        patch.setattr(os, step, fail)
        if step == "replace":
            patch.setattr(os, "rename", fail)
        with pytest.raises(OSError, match="disk full"):
            index.save(path)
    assert path.read_bytes() == before
    assert [file.name for file in path.parent.iterdir()] == [path.name]
    assert load(path).ntotal == index.ntotal - len(base)


def test_the_file_is_synced_before_it_is_renamed(path, monkeypatch):
    index, _, _ = shared()
    events = []
    sync, replace = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda handle: (events.append("fsync"), sync(handle))[1])
    monkeypatch.setattr(os, "replace", lambda a, b: (events.append("replace"), replace(a, b))[1])
    index.save(path)
    assert "fsync" in events[: events.index("replace")]
    assert path.exists()


def test_a_saved_file_has_the_permissions_of_the_umask(path):
    """A temporary file may be readable by its owner alone; the saved file has the permissions of the umask."""
    if os.name != "posix":
        pytest.skip("file modes are those of posix")
    index, _, _ = shared()
    old = os.umask(0o022)
    try:
        index.save(path)
    finally:
        os.umask(old)
    assert path.stat().st_mode & 0o777 == 0o644


def test_mmap_does_not_read_the_vectors(path):
    """The memory of a mapped tensor is the mapped file."""
    maps = Path("/proc/self/maps")
    if not maps.exists():
        pytest.skip("needs a list of mapped files")
    index, _, _ = shared()
    index.save(path)
    loaded = load(path, mmap=True)
    address = loaded._buffers["packed_embeddings"].data_ptr()
    pages = [line.split() for line in maps.read_text().splitlines() if line.endswith(str(path))]
    ranges = [[int(end, 16) for end in page[0].split("-")] for page in pages]
    assert any(start <= address < end for start, end in ranges)
