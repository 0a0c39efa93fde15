"""Indexes in files built from files of vectors: what `train`, `add` and `save` would write, whole or not at all."""

from __future__ import annotations

import subprocess
import sys
import zipfile

import numpy as np
import pytest
import torch
from torch import nn

from tests import jobs_build, processes
from tests.datasets import normal
from tests.states import same_state
from tests.vector_files import ROWS, WRITERS, D
from torch_ivf_module import (
    IndexFlatIP,
    IndexFlatL2,
    IndexIVFFlat,
    IndexIVFScalarQuantizer,
    IndexPreTransform,
    IndexScalarQuantizer,
    build_file,
    load,
)
from torch_ivf_module.streaming.spool import Spool, SpoolWriter

N = 6_000
SMALL = 250_000  # bytes, in which some hundred rows are handled at a time
FEW = 16  # lists, of which the sample does not need all rows


@pytest.fixture(scope="module")
def x():
    return normal(N, D)


def transformed() -> IndexPreTransform:
    layer = nn.Linear(D, 5).requires_grad_(False)
    layer.weight.copy_(normal(5, D, seed=3)), layer.bias.zero_()
    return IndexPreTransform(D, layer, IndexIVFFlat(5, nlist=FEW))


INDEXES = {
    "ivf": lambda: IndexIVFFlat(D, nlist=FEW, nprobe=3, k=7),
    "cosine half": lambda: IndexIVFFlat(D, nlist=FEW, metric="cosine", dtype=torch.float16),
    "ip bfloat16": lambda: IndexIVFFlat(D, nlist=FEW, metric="ip", dtype=torch.bfloat16),
    "codes": lambda: IndexIVFScalarQuantizer(D, nlist=FEW, bits=4),
    "cosine codes": lambda: IndexIVFScalarQuantizer(D, nlist=FEW, metric="cosine"),
    "flat": lambda: IndexFlatL2(D),
    "flat half": lambda: IndexFlatIP(D, dtype=torch.float16),
    "flat codes": lambda: IndexScalarQuantizer(D, bits=8),
    "behind a transform": transformed,
}


def in_memory(index, x, ids=None):
    """An index as it is built in memory."""
    index.train(x)
    index.add(x) if ids is None else index.add_with_ids(x, ids)
    return index


def same_file(path, expected) -> None:
    """Assert that a file has the description, the checksums and the tensors that `expected.save` writes."""
    expected.save(path.with_name(f"expected{path.suffix}"))
    assert same_state(load(path).state_dict(), expected.state_dict())  # checksums are compared by load
    assert same_state(load(path, mmap=True).state_dict(), expected.state_dict())
    if path.suffix == ".pt":
        written, saved = (torch.load(path.with_name(name)) for name in (path.name, "expected.pt"))
        assert same_state(written.pop("state"), saved.pop("state"))
    else:
        from safetensors import safe_open

        with safe_open(path, "pt") as one, safe_open(path.with_name("expected.safetensors"), "pt") as other:
            written, saved = one.metadata(), other.metadata()
    assert written == saved
    path.with_name(f"expected{path.suffix}").unlink()


@pytest.mark.parametrize("memory", [SMALL, 64 << 20])
@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
@pytest.mark.parametrize("kind", INDEXES)
def test_the_file_is_that_of_an_index_built_in_memory(kind, suffix, memory, x, tmp_path):
    if suffix == ".safetensors":
        pytest.importorskip("safetensors")
    index = INDEXES[kind]()
    path = tmp_path / f"index{suffix}"
    built = build_file(x, path, index, max_memory=memory)
    assert (built.ntotal, index.ntotal) == (N, 0)
    assert list(tmp_path.iterdir()) == [path]
    assert path.stat().st_size == built.bytes
    same_file(path, in_memory(INDEXES[kind](), x))
    queries = x[:5]
    assert torch.equal(load(path, mmap=True, **({"codes": 8} if kind == "ivf" else {})).search(queries, 3)[1],
                       load(path).search(queries, 3)[1])  # fmt: skip


@pytest.mark.parametrize("name", WRITERS)
def test_every_kind_of_file(name, tmp_path):
    x = normal(ROWS, D)
    WRITERS[name](tmp_path / name, x)
    ids = torch.randperm(ROWS, generator=torch.Generator().manual_seed(0)) * 7 - 51
    np.save(tmp_path / "ids.npy", ids.numpy())
    settings = {"ids": tmp_path / "ids.npy", "max_memory": SMALL}
    build_file(tmp_path / name, tmp_path / "index.pt", IndexIVFFlat(D, nlist=8), **settings)
    same_file(tmp_path / "index.pt", in_memory(IndexIVFFlat(D, nlist=8), x, ids))


def test_an_archive_that_other_programs_read(x, tmp_path):
    build_file(x, tmp_path / "index.pt", IndexFlatL2(D))
    with zipfile.ZipFile(tmp_path / "index.pt") as archive:
        assert archive.testzip() is None
    rows = load(tmp_path / "index.pt", mmap=True).packed_embeddings
    assert rows.data_ptr() % 64 == 0


def test_vectors_ids_and_rows_of_every_kind(x, tmp_path):
    ids = torch.arange(N) * 3 + 5
    part = slice(1000, 2500)
    expected = in_memory(IndexIVFFlat(D, nlist=8), x[part], ids[part])
    np.save(tmp_path / "x.npy", x.numpy())
    np.savez(tmp_path / "x.npz", x=x.numpy(), ids=ids.numpy()[None])
    mapped = np.load(tmp_path / "x.npy", mmap_mode="r")
    for vectors, key, given in (
        (tmp_path / "x.npz", "x", "ids"), (tmp_path / "x.npy", None, tmp_path / "x.npz"), (mapped, None, ids.numpy()),
        (x, None, ids), (x.double(), None, ids.int()), (mapped, None, range(5, 3 * N + 5, 3)),
    ):  # fmt: skip
        settings = {"key": key, "ids": given, "rows": range(1000, 2500)}
        build_file(vectors, tmp_path / "index.pt", IndexIVFFlat(D, nlist=8), **settings)
        same_file(tmp_path / "index.pt", expected)
    build_file(mapped, tmp_path / "index.pt", IndexFlatL2(D), rows=70)
    same_file(tmp_path / "index.pt", in_memory(IndexFlatL2(D), x[:70]))
    build_file(mapped, tmp_path / "index.pt", IndexFlatL2(D), rows=range(0))
    same_file(tmp_path / "index.pt", IndexFlatL2(D))


def test_a_trained_index_keeps_its_centroids_and_its_numbering(x, tmp_path):
    index = IndexIVFFlat(D, nlist=8, list_ordering="residual_norm_asc").train(x[:900])
    index.add(x[:10])
    index.remove_ids(torch.arange(10))
    built = build_file(x, tmp_path / "index.pt", index, max_memory=SMALL)
    assert built.trained_on == 0
    index.add(x)
    same_file(tmp_path / "index.pt", index)
    with pytest.raises(ValueError, match="train_rows is for an index that is not trained yet"):
        build_file(x, tmp_path / "index.pt", built.index, train_rows=100)


def test_the_usual_index(x, tmp_path):
    built = build_file(x, tmp_path / "index.pt")
    assert (built.index.nlist, built.index.metric, built.index.d) == (N // 39, "l2", D)
    WRITERS["x.hdf5"](tmp_path / "x.hdf5", x)
    assert build_file(tmp_path / "x.hdf5", tmp_path / "index.pt").index.metric == "l2"


def test_fewer_training_rows(x, tmp_path):
    built = build_file(x, tmp_path / "index.pt", IndexIVFFlat(D, nlist=8), train_rows=500, niter=3, seed=4)
    assert built.trained_on == 500
    again = build_file(x, tmp_path / "index.pt", IndexIVFFlat(D, nlist=8), train_rows=500, niter=3, seed=4)
    assert torch.equal(built.index.centroids, again.index.centroids)


def test_one_list_may_be_longer_than_memory(x, tmp_path):
    """Rows that are merged a hundred at a time, most of them in one list."""
    x = torch.cat([x[:500], x[:1].expand(4_000, -1), x[500:900]])
    index = IndexIVFFlat(D, nlist=8).train(x[:500])
    build_file(x, tmp_path / "index.pt", index, max_memory=SMALL)
    index.add(x)
    same_file(tmp_path / "index.pt", index)


@pytest.mark.parametrize("most", [1, 7, 100, 10_000])
def test_a_spool_is_read_in_the_order_of_lists(most, tmp_path):
    assigned = torch.randint(0, 9, (900,), generator=torch.Generator().manual_seed(2))
    assigned[300:] = torch.where(assigned[300:] < 6, 4, assigned[300:])
    rows = torch.arange(1800).view(900, 2).half()
    for name, part in (("a", slice(0, 400)), ("b", slice(400, 400)), ("c", slice(400, 900))):
        writer = SpoolWriter(tmp_path / name, 10)
        for piece in torch.arange(900)[part].split(90):
            writer.push(rows[piece], piece, assigned[piece])
        writer.close()
    spool = Spool([tmp_path / name for name in "abc"], 10, rows[:0])
    order = torch.sort(assigned, stable=True).indices
    assert torch.equal(spool.offsets.diff(), torch.bincount(assigned, minlength=10))
    for start, end in ((0, 900), (0, 1), (130, 131), (333, 777), (899, 900), (900, 900)):
        for column, expected in (("ids", order), ("rows", rows[order])):
            pieces = list(spool.read(column, most, start, end))
            assert torch.equal(torch.cat([expected[:0], *pieces]), expected[start:end])
            assert all(piece.shape[0] <= most for piece in pieces)


def test_wrong_arguments(x, tmp_path):
    path, index = tmp_path / "index.pt", IndexIVFFlat(D, nlist=8)
    np.save(tmp_path / "x.npy", x.numpy())
    filled = in_memory(IndexFlatL2(D), x[:3])
    far = x.clone()
    far[4321, 3] = 1e30
    for error, says, arguments in (
        (ValueError, "index must be empty, got one of 3 vectors", (x, path, filled)),
        (ValueError, "index must have d = 12, the dimension of vectors, got 13", (x, path, IndexFlatL2(13))),
        (TypeError, "index must be an index of this package", (x, path, nn.Linear(2, 2))),
        (ValueError, r"vectors must have shape \(n, d\), got \(12,\)", (x[0], path)),
        (TypeError, "vectors must be float", (x.long(), path)),
        (FileNotFoundError, "no such file", (tmp_path / "none.npy", path)),
        (FileNotFoundError, "no such folder", (x, tmp_path / "none" / "index.pt", IndexFlatL2(D))),
        (ValueError, "rows 4,... to 4,... of vectors: x must be finite", (far, path, IndexFlatL2(D, dtype=torch.half))),
    ):
        with pytest.raises(error, match=says):
            build_file(*arguments, max_memory=SMALL)
    for error, says, settings in (
        (ValueError, "rows must be a number or a range of step 1 within 0 to 6,000", {"rows": range(6_001)}),
        (ValueError, "rows must be >= 1", {"rows": 0}),
        (ValueError, "key names an array of a file", {"key": "x"}),
        (TypeError, "ids must be a tensor or an array, not a file", {"ids": "ids.npy"}),
        (ValueError, "ids must have one id for each of the 6000 rows", {"ids": torch.arange(3)}),
        (ValueError, "a row per list for 8 lists, got 7", {"train_rows": 7}),
        (ValueError, "max_memory must be more than", {"max_memory": 3_000}),
    ):
        with pytest.raises(error, match=says):
            build_file(x, path, index, **settings)
    assert [file.name for file in tmp_path.iterdir()] == ["x.npy"]


# Builds an index, and stops in the middle of a step: at the second or third call of a method.
STOPPED = """
import sys, torch
from torch_ivf_module import IndexIVFFlat, build_file
from torch_ivf_module.streaming import build, spool
owner, name, calls = {
    "train": (build, "fitted", 1),
    "assign": (spool.SpoolWriter, "push", 3),
    "write": (spool.Spool, "_filled", 7),
}[sys.argv[1]]
method, left = getattr(owner, name), [calls]

def stopping(*arguments, **settings):
    left[0] -= 1
    if not left[0]:
        print("begun", flush=True)
        sys.stdin.read()
    return method(*arguments, **settings)

setattr(owner, name, stopping)
build_file("x.npy", "index.pt", IndexIVFFlat(12, nlist=16), max_memory=250_000)
"""


@pytest.mark.parametrize("step", ["train", "assign", "write"])
def test_a_build_that_was_killed_is_repeated(step, x, tmp_path):
    np.save(tmp_path / "x.npy", x.numpy())
    path = tmp_path / "index.pt"
    if step == "write":  # what is there remains
        in_memory(IndexFlatL2(D), x[:3]).save(path)
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen([sys.executable, "-c", STOPPED, step], cwd=tmp_path, **pipes) as process:
        assert process.stdout.readline() == "begun\n"
        assert path.exists() == (step == "write")
        process.kill()
    assert len(list(tmp_path.glob(".index.pt.*.part"))) == 1
    assert load(path).ntotal == 3 if step == "write" else not path.exists()
    build_file(tmp_path / "x.npy", path, IndexIVFFlat(D, nlist=FEW), max_memory=SMALL)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["index.pt", "x.npy"]
    same_file(path, in_memory(IndexIVFFlat(D, nlist=FEW), x))


def test_bars_say_what_is_left(x, tmp_path, capsys):
    build_file(x, tmp_path / "index.pt", IndexIVFFlat(D, nlist=8), max_memory=SMALL)
    assert capsys.readouterr().err == ""
    build_file(x, tmp_path / "index.pt", IndexIVFFlat(D, nlist=8), max_memory=SMALL, verbose=True)
    drawn = capsys.readouterr().err
    assert all(f"{title}:" in drawn for title in ("sample", "k-means", "assign", "write"))


# --- by several processes -----------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1, 3])
def test_a_sharded_index_is_built_by_all_processes(size, tmp_path):
    assert processes.run(jobs_build.builds, size, str(tmp_path)) == [0] * size
    assert sorted(file.name for file in tmp_path.iterdir()) == ["index-000005", "newest", "vectors.npy"]


def test_all_processes_refuse_what_one_refuses(tmp_path):
    assert processes.run(jobs_build.refuses, 2, str(tmp_path)) == [0, 0]
    assert list(tmp_path.rglob("*")) == [tmp_path / "index"]
