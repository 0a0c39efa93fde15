"""Files of vectors, of ids and of true neighbours, in every format, valid and damaged."""

from __future__ import annotations

import json
import re
from decimal import Decimal

import numpy as np
import pytest
import torch

from tests.datasets import normal
from tests.vector_files import ROWS, WRITERS, D, hdf5, matrix, nested, parquet, records
from torch_ivf_module import IndexFlatL2, load
from torch_ivf_module.cli import main
from torch_ivf_module.vector_files import KINDS, open_vectors


@pytest.fixture(scope="module")
def x():
    return normal(ROWS, D)


@pytest.fixture(params=WRITERS)
def file(request, tmp_path, x):
    WRITERS[request.param](tmp_path / request.param, x)
    return tmp_path / request.param



def test_vectors_are_read_as_they_were_written(file, x):
    vectors = open_vectors(file)
    assert (vectors.rows, vectors.d) == (ROWS, D)
    assert torch.equal(torch.cat(list(vectors.batches(250))), x)
    assert torch.equal(vectors.read(700, 710), x[700:710])
    assert torch.equal(vectors.read(5, 7), x[5:7]), "rows can be read in any order"
    assert vectors.read(4, 4).shape == (0, D)


def test_every_format_has_a_test_file():
    elsewhere = {".bvecs", ".ivecs", ".u8bin", ".i8bin", ".ibin", ".pth"}  # formats of integers
    assert {"." + name.rpartition(".")[2] for name in WRITERS} | elsewhere == set(KINDS)


def test_vectors_read_are_writable(file, x):
    open_vectors(file).read(0, 10).zero_()
    assert torch.equal(open_vectors(file).read(0, 10), x[:10])


def test_chosen_rows_are_read_in_their_order(file, x):
    vectors = open_vectors(file)
    numbers = torch.tensor([0, 3, 4, 63, 64, 130, 500, ROWS - 1])
    for size in (1, 64, 333, 2000):
        parts = list(vectors.take(numbers, size))
        assert torch.equal(torch.cat(parts), x[numbers])
        assert len(parts) == len(set((numbers // size).tolist()))
    assert list(vectors.take(numbers[:0], 64)) == []


def test_bytes_and_integers_become_floats(tmp_path):
    integers = torch.randint(0, 255, (40, D))
    records(tmp_path / "x.bvecs", integers, "u1")
    matrix(tmp_path / "x.u8bin", integers, "u1")
    matrix(tmp_path / "x.ibin", integers, "<i4")
    np.save(tmp_path / "x.npy", integers.numpy().astype(np.int16))
    for name in ("x.bvecs", "x.u8bin", "x.ibin", "x.npy"):
        assert torch.equal(open_vectors(tmp_path / name).read(0, 40), integers.float())
    matrix(tmp_path / "x.i8bin", integers - 127, "i1")
    assert torch.equal(open_vectors(tmp_path / "x.i8bin").read(0, 40), integers.float() - 127)


def test_other_float_dtypes_are_converted(tmp_path):
    x = torch.randint(-8, 8, (9, 3)).float()  # exact in all dtypes
    torch.save(x.to(torch.float8_e4m3fn), tmp_path / "x8.pt")
    torch.save(x.bfloat16(), tmp_path / "x16.pt", _use_new_zipfile_serialization=False)
    np.save(tmp_path / "long.npy", x.numpy().astype(np.longdouble))
    np.save(tmp_path / "X64.NPY", x.numpy().astype(">f8"))
    (tmp_path / "X64.NPY.npy").rename(tmp_path / "X64.NPY")
    for name, dtype in {
        "x8.pt": torch.float32, "x16.pt": torch.bfloat16, "long.npy": torch.float64, "X64.NPY": torch.float64,
    }.items():  # fmt: skip
        read = open_vectors(tmp_path / name).read(2, 9)
        assert read.dtype == dtype
        assert torch.equal(read.float(), x[2:])


def _broken(tmp_path, x):
    """Files without vectors, and the text of the error of each."""
    np.save(tmp_path / "flat.npy", np.zeros(7))
    np.save(tmp_path / "bool.npy", np.zeros((7, 2), dtype=bool))
    np.save(tmp_path / "objects.npy", np.array([[{}]], dtype=object))
    np.savez(tmp_path / "two.npz", a=x.numpy(), b=x.numpy())
    records(tmp_path / "cut.fvecs", x, "<f4")
    content = (tmp_path / "cut.fvecs").read_bytes()
    (tmp_path / "cut.fvecs").write_bytes(content[:-2])
    row_40 = 40 * (4 + 4 * D)
    (tmp_path / "mixed.fvecs").write_bytes(content[:row_40] + b"\x07\0\0\0" + content[row_40 + 4 :])
    (tmp_path / "empty.fvecs").write_bytes(b"")
    matrix(tmp_path / "cut.fbin", x, "<f4")
    (tmp_path / "cut.fbin").write_bytes((tmp_path / "cut.fbin").read_bytes()[:-1])
    matrix(tmp_path / "wide.u8bin", x, "<f4")
    (tmp_path / "short.fbin").write_bytes(b"\1\0\0\0")
    (tmp_path / "flat.fbin").write_bytes(bytes(8))
    (tmp_path / "words.bin").write_bytes(bytes(8))
    (tmp_path / "folder.npy").mkdir()
    np.savez(tmp_path / "row.npz", a=np.arange(3))
    np.savez_compressed(tmp_path / "damaged.npz", a=x.numpy())
    packed = bytearray((tmp_path / "damaged.npz").read_bytes())
    packed[2_000:2_040] = bytes(40)
    (tmp_path / "damaged.npz").write_bytes(packed)
    torch.save({"model": {"x": x}}, tmp_path / "nested.pt")
    torch.save(x.to_sparse(), tmp_path / "sparse.pt")
    torch.save(x.to(torch.complex64), tmp_path / "complex.pt")
    (tmp_path / "junk.pt").write_bytes(b"not a file of torch")
    (tmp_path / "junk.npz").write_bytes(b"PK not a zip")
    return {
        "flat.npy": r"shape \(n, d\)", "bool.npy": "floats or integers", "objects.npy": "cannot be read",
        "two.npz": "'a', 'b': say which with --key", "cut.fvecs": "no whole number", "mixed.fvecs": "row 40",
        "cut.fbin": r"900 rows of 12, which take 43,208 bytes, but it has 43,207", "wide.u8bin": "it has 43,208",
        "short.fbin": "too few for the header", "flat.fbin": "damaged", "words.bin": "must end in",
        "empty.fvecs": "empty", "folder.npy": "is a folder",
        "row.npz": r"\(n, d\).* got 'a'",
        "damaged.npz": "cannot be read", "nested.pt": r"\(n, d\), alone or by a name", "sparse.pt": "to_dense",
        "complex.pt": "floats or integers", "junk.pt": "cannot be read", "junk.npz": "cannot be read",
    }  # fmt: skip


def test_files_without_vectors_are_refused(tmp_path, x):
    for name, says in _broken(tmp_path, x).items():
        with pytest.raises((OSError, ValueError), match=says) as caught:
            list(open_vectors(tmp_path / name).batches(100))
        assert name in str(caught.value)
    with pytest.raises(ValueError, match="no 'c', but 'a', 'b'"):
        open_vectors(tmp_path / "two.npz", "c")
    with pytest.raises(FileNotFoundError):
        open_vectors(tmp_path / "nowhere.npy")


@pytest.mark.parametrize(("name", "separator"), [("x.csv", ","), ("x.tsv", "\t"), ("x.txt", " ")])
def test_text_is_refused_with_the_conversion(name, separator, x, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    np.savetxt(name, x.numpy(), delimiter=separator)
    with pytest.raises(ValueError, match=f"{name} is text, which is not read; convert it once") as caught:
        open_vectors(name)
    exec(str(caught.value).partition("once: ")[2], {})
    assert torch.equal(open_vectors("x.npy").read(0, ROWS), x)


@pytest.mark.parametrize("name", ["x.npy", "alone.pt", "x.fvecs", "x.fbin"])
def test_names_for_a_file_of_one_array_are_refused(name, x, tmp_path):
    {**WRITERS, "alone.pt": lambda path, x: torch.save(x, path)}[name](tmp_path / name, x)
    with pytest.raises(ValueError, match="holds no 'foo', but one array without a name: leave --key out"):
        open_vectors(tmp_path / name, "foo")


# --- Parquet and HDF5 ---------------------------------------------------------------------------------------


def test_the_array_is_found_within_groups(x, tmp_path):
    nested(tmp_path / "x.h5", x)
    assert torch.equal(open_vectors(tmp_path / "x.h5", "images/vectors/x").read(3, 9), x[3:9])
    assert open_vectors(tmp_path / "x.h5").name.endswith("x.h5, 'images/vectors/x'")
    with pytest.raises(ValueError, match="no 'x', but 'images/"):
        open_vectors(tmp_path / "x.h5", "x")
    with pytest.importorskip("h5py").File(tmp_path / "roles.h5", "w") as file:
        for place, part in (("glove", x[:50]), ("glove/test", x[:5]), ("glove/train", x)):
            file[f"{place}/all" if place == "glove" else place] = part.numpy()
        file["glove/neighbors"] = np.arange(15).reshape(5, 3)
    assert open_vectors(tmp_path / "roles.h5").rows == ROWS
    queries = open_vectors(tmp_path / "roles.h5", role="test")
    assert queries.rows == 5
    assert queries.truth.tolist() == np.arange(15).reshape(5, 3).tolist()


def test_parquet_is_read_in_any_order(x, tmp_path):
    parquet(tmp_path / "x.parquet", x, fixed=False, other=x.double().tolist(), half=list(x.half().numpy()))
    with pytest.raises(ValueError, match="'vectors', 'other', 'half': say which with --key"):
        open_vectors(tmp_path / "x.parquet")
    for key, rows in {"vectors": x, "other": x.double(), "half": x.half()}.items():
        vectors = open_vectors(tmp_path / "x.parquet", key)
        for start, end in ((700, 900), (0, 900), (249, 251), (500, 501), (10, 10), (501, 760), (3, 4)):
            assert torch.equal(vectors.read(start, end), rows[start:end])
            assert vectors.read(start, end).dtype == rows.dtype


@pytest.mark.parametrize(
    ("lists", "says"),
    [
        ([[1.0, 2.0], [3.0, 4.0], [5.0]], "row 2 does not hold 2 numbers as row 0 does"),
        ([[1.0, 2.0], None, [5.0, 6.0]], "row 1 is null"),
        ([[1.0, 2.0], [3.0, 4.0], [5.0, None]], "row 2 holds null"),
        ([None, [1.0, 2.0]], r"must have shape \(n, d\), got \(2, 0\)"),
        ([[], [1.0]], r"must have shape \(n, d\), got \(2, 0\)"),
        ([["a"], ["b"]], "must hold an array of shape"),
        ([1.5, 2.5], "must hold an array of shape"),
    ],
)
def test_parquet_lists_that_are_no_vectors_are_refused(lists, says, tmp_path):
    arrow, write = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet").write_table
    write(arrow.table({"x": lists}), tmp_path / "x.parquet", row_group_size=2)
    with pytest.raises(ValueError, match=says) as caught:
        open_vectors(tmp_path / "x.parquet").read(0, len(lists))
    assert "x.parquet" in str(caught.value)


def test_parquet_is_read_after_a_refusal(tmp_path):
    arrow, write = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet").write_table
    write(arrow.table({"x": [[1.0], [2.0], [None], [4.0], [5.0]]}), tmp_path / "x.parquet", row_group_size=2)
    vectors = open_vectors(tmp_path / "x.parquet")
    for start, end in ((0, 2), (4, 5)):
        with pytest.raises(ValueError, match="row 2 holds null"):
            vectors.read(0, 5)
        assert vectors.read(start, end).flatten().tolist() == [[1.0, 2.0], [5.0]][start // 4]


@pytest.mark.parametrize(
    ("column", "kind"),
    [
        (["a"] * ROWS, "string"),
        ([Decimal("1.50")] * ROWS, r"decimal128\(3, 2\)"),
        ([["a", "b"]] * ROWS, "list<.*string>"),
        ([[Decimal("1.50")]] * ROWS, r"list<.*decimal128\(3, 2\)>"),
        ([{"x": 1.0}] * ROWS, "struct<x: double>"),
        ([True] * ROWS, "bool"),
    ],
)
def test_the_error_for_a_column_without_numbers_names_its_type(column, kind, x, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    parquet("x.parquet", x, other=column)
    says = rf"x\.parquet, 'other' holds values of type {kind}, not floats or integers"
    with pytest.raises(ValueError, match=says):
        open_vectors("x.parquet", "other")
    assert open_vectors("x.parquet").name == "x.parquet, 'vectors'"
    assert run("build", "x.parquet", "index.pt", "--flat", "--ids-from", "other") == 1
    assert re.search(says, capsys.readouterr().err)


def test_a_damaged_parquet_file_is_refused(x, tmp_path):
    parquet(tmp_path / "x.parquet", x)
    content = (tmp_path / "x.parquet").read_bytes()
    (tmp_path / "x.parquet").write_bytes(content[:-20])
    with pytest.raises(ValueError, match=r"x\.parquet cannot be read"):
        open_vectors(tmp_path / "x.parquet")
    (tmp_path / "x.parquet").write_bytes(content[:100] + bytes(9000) + content[9100:])
    with pytest.raises(ValueError, match=r"x\.parquet, 'vectors' cannot be read"):
        open_vectors(tmp_path / "x.parquet").read(0, ROWS)


# --- ids ----------------------------------------------------------------------------------------------------


def run(*words) -> int:
    return main([str(word) for word in words])


def _same_file(name, x, ids):
    """Write the vectors and their ids to one file."""
    if name == "x.npz":
        np.savez(name, x=x.numpy(), id=ids)
    elif name == "x.pt":
        torch.save({"x": x, "id": torch.from_numpy(ids)}, name)
    elif name == "x.safetensors":
        pytest.importorskip("safetensors.torch").save_file({"x": x, "id": torch.from_numpy(ids)}, name)
    elif name == "x.h5":
        with pytest.importorskip("h5py").File(name, "w") as file:
            file["x"], file["id"] = x.numpy(), ids
    else:
        parquet(name, x, id=ids)


@pytest.mark.parametrize("name", ["x.npz", "x.pt", "x.safetensors", "x.h5", "x.parquet"])
def test_ids_of_the_same_file(name, x, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    ids = np.arange(ROWS) * 7 - 10**12
    _same_file(name, x, ids)
    assert run("build", name, "index.pt", "--flat", "--ids-from", "id", "--rows", 600, "--batch", 250) == 0
    assert load("index.pt").list_ids.tolist() == ids[:600].tolist()


def test_ids_of_another_file(x, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    np.save("x.npy", x.numpy())
    ids = torch.arange(ROWS) + 2**20
    np.save("big.npy", ids.numpy().astype(">u4"))
    np.savez("one.npz", ids.numpy())
    np.savez("named.npz", ids=ids.numpy(), other=np.arange(3))
    torch.save(ids, "ids.pt")
    records(tmp_path / "many.ivecs", ids[:, None], "<i4")
    records(tmp_path / "one.ivecs", ids[None], "<i4")
    matrix(tmp_path / "ids.ibin", ids[:, None], "<i4")
    parquet("ids.parquet", x, id=ids.numpy())
    for name in ("big.npy", "one.npz", "named.npz", "ids.pt", "many.ivecs", "one.ivecs", "ids.ibin", "ids.parquet"):
        assert run("build", "x.npy", "index.pt", "--flat", "--ids-from", name) == 0
        assert torch.equal(load("index.pt").list_ids, ids)


def test_arrays_that_are_no_ids_are_refused(x, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    np.savez("x.npz", x=x.numpy(), label=np.array(["a"] * ROWS), weight=np.zeros(ROWS), short=np.arange(5))
    np.save("huge.npy", np.full(ROWS, 2**63, dtype=np.uint64))
    np.save("minus.npy", np.arange(ROWS) - 7)
    np.savetxt("ids.csv", np.arange(ROWS))
    (tmp_path / "empty.npy").write_bytes(b"")
    np.savez("two.npz", a=np.arange(ROWS), b=np.arange(ROWS))
    for name, says in {
        "label": "'label' must hold integers, got other values", "weight": "got floats of shape (900,)",
        "short": "one id for each of the 900 rows", "x": "must hold integers", "huge.npy": "for row 0",
        "minus.npy": "-1 for row 6", "empty.npy": "cannot be read", "two.npz": "holds 'a', 'b'",
        "ids.csv": "dtype=np.int64", "none.npy": "no such file, and no such array in x.npz: 'x', 'label'",
    }.items():  # fmt: skip
        assert run("build", "x.npz", "index.pt", "--key", "x", "--flat", "--ids-from", name) == 1
        said = capsys.readouterr().err
        assert name in said
        assert says in said
    assert run("build", "x.npz", "minus.npy", "--ids-from", "minus.npy") == 1
    assert "would overwrite" in capsys.readouterr().err


# --- true neighbours ----------------------------------------------------------------------------------------


def test_recall_against_a_file_of_neighbours(x, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    index = IndexFlatL2(D)
    index.add(x)
    index.save("index.pt")
    np.save("q.npy", x[:30].numpy())
    truth = index.search(x[:30], 20)[1]
    half = truth.clone()
    half[:, :5] += 10**6  # of the first ten, five are found
    few = truth.clone()
    few[:, 3:] = -1  # and some have fewer neighbours
    few[::2, 1] += 10**6
    records(tmp_path / "t.ivecs", truth, "<i4")
    matrix(tmp_path / "t.ibin", truth, "<i4")
    (tmp_path / "gt.ibin").write_bytes((tmp_path / "t.ibin").read_bytes() + bytes(30 * 20 * 4))  # with distances
    np.save("half.npy", half.numpy())
    np.save("few.npy", few.numpy())
    hdf5(tmp_path / "t.hdf5", x)
    for name, recall in {"t.ivecs": 1, "t.ibin": 1, "gt.ibin": 1, "half.npy": 0.5, "few.npy": 1 - 0.5 / 3}.items():
        assert run("search", "index.pt", "q.npy", "--truth", name, "--json") == 0
        assert json.loads(capsys.readouterr().out)["recall"] == pytest.approx(recall)
    assert run("search", "index.pt", "t.hdf5", "--truth", "t.hdf5", "--json") == 0
    assert json.loads(capsys.readouterr().out)["recall"] == 1
    np.save("float.npy", truth.double().numpy())
    for words, says in {
        ("t.ivecs", "-k", 21): "holds 20 neighbours of each query, but k is 21: search with -k 20 or fewer",
        ("t.hdf5",): "'neighbors' holds the neighbours of 20 queries, but there are 30",
        ("float.npy",): "must hold integers of shape (queries, neighbours), got floats of shape (30, 20)",
        ("none.ivecs",): "no such file",
        ("half.npy", "--ids", "half.npy"): "would overwrite",
    }.items():
        assert run("search", "index.pt", "q.npy", "--truth", *words) == 1
        assert says in capsys.readouterr().err


@pytest.mark.parametrize("queries", [1, 30])
@pytest.mark.parametrize("k", [1, 5])
def test_neighbours_in_text_are_refused_with_the_conversion(queries, k, x, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    index = IndexFlatL2(D)
    index.add(x)
    index.save("index.pt")
    np.save("q.npy", x[:queries].numpy())
    np.savetxt("t.csv", index.search(x[:queries], k)[1].numpy(), fmt="%d", delimiter=",")
    assert run("search", "index.pt", "q.npy", "-k", k, "--truth", "t.csv") == 1
    exec(capsys.readouterr().err.partition("once: ")[2], {})
    assert run("search", "index.pt", "q.npy", "-k", k, "--truth", "t.npy", "--json") == 0
    assert json.loads(capsys.readouterr().out)["recall"] == 1
