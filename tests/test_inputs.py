"""Input that is converted to tensors: numpy arrays, memory maps, lists, ranges; other input is refused."""

from __future__ import annotations

import warnings

import numpy
import pytest
import torch
from torch import nn

from tests.datasets import normal
from torch_ivf_module import IndexFlatL2, IndexIVFFlat, IndexPreTransform, SearchParams

D = 8
X = normal(200, D)


def mapped(path, array):
    numpy.save(path / "x.npy", array)
    return numpy.load(path / "x.npy", mmap_mode="r")


def read_only(array):
    array = array.copy()
    array.flags.writeable = False
    return array


VECTORS = {
    "array": lambda array, path: array,
    "float64": lambda array, path: array.astype("f8"),
    "memory map": lambda array, path: mapped(path, array),
    "read-only": lambda array, path: read_only(array),
    "other byte order": lambda array, path: array.astype(">f4"),
    "reversed twice": lambda array, path: array[::-1].copy()[::-1],
    "columns first": lambda array, path: numpy.asfortranarray(array),
    "list": lambda array, path: array.tolist(),
    "list of arrays": lambda array, path: list(array),
}


@pytest.mark.parametrize("kind", VECTORS)
def test_vectors(kind, tmp_path):
    x = VECTORS[kind](X.numpy(), tmp_path)
    index = IndexIVFFlat(D, nlist=4, nprobe=4, k=1)
    assert index.train(x) is index
    expected = IndexIVFFlat(D, nlist=4, nprobe=4, k=1).train(X)
    torch.testing.assert_close(index.centroids, expected.centroids)
    index.add(x)
    index.add_with_ids(x, range(1000, 1200))
    index.update([1000, 1001], x[:2])
    found, ids = index.search(x, 2)
    assert isinstance(found, torch.Tensor)
    assert ids.sort().values.equal(torch.stack([torch.arange(200), torch.arange(1000, 1200)], 1))
    assert index(x)[0].shape == (200, 1)
    lims, _, ids = index.range_search(x, numpy.full(200, 1e-6, "f4"))
    assert lims[-1] == 400
    assert index.range_search(x[:2], [1e-6, 1e-6])[0].tolist() == [0, 2, 4]
    transformed = IndexPreTransform(D, nn.Identity(), IndexFlatL2(D, k=1))
    transformed.add(x)
    assert transformed.search(x, 1)[1][:, 0].equal(torch.arange(200))
    assert transformed(x)[1][:, 0].equal(torch.arange(200))
    assert index.graph(k=1)(x)[1].shape == (200, 1)


IDS = {
    "list": [3, 5],
    "tuple": (3, 5),
    "range": range(3, 7, 2),
    "int64": numpy.array([3, 5]),
    "int32": numpy.array([3, 5], "i4"),
    "uint64": numpy.array([3, 5], "u8"),
    "big-endian": numpy.array([3, 5], ">i8"),
    "read-only": read_only(numpy.array([3, 5])),
    "mask": numpy.arange(200) % 2 * (numpy.arange(200) < 6) * (numpy.arange(200) > 1) == 1,
    "list of bool": [False, False, False, True, False, True],
}


@pytest.mark.parametrize("kind", IDS)
def test_ids(kind):
    ids = IDS[kind]
    index = IndexFlatL2(D)
    index.add(X)
    found = index.search(X[:9], 3, params=SearchParams(selector=ids))[1]
    assert found.unique().tolist() == [-1, 3, 5]
    assert index.copy_subset(ids).list_ids.tolist() == [3, 5]
    if "mask" not in kind and "bool" not in kind:
        assert index.reconstruct_batch(ids).equal(X[[3, 5]])
    assert index.remove_ids(ids) == 2
    assert index.remove_ids([]) == 0
    assert index.ntotal == 198


def quietly(make):
    """``make()`` without torch's warnings that such tensors are experimental."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return make()


LAYOUTS = {
    "coo": (lambda x: x.to_sparse(), "to_dense()"),
    "csr": (lambda x: x.to_sparse_csr(), "to_dense()"),
    "csc": (lambda x: x.to_sparse_csc(), "to_dense()"),
    "bsr": (lambda x: x.to_sparse_bsr((2, 2)), "to_dense()"),
    "bsc": (lambda x: x.to_sparse_bsc((2, 2)), "to_dense()"),
    "mkldnn": (lambda x: x.to_mkldnn(), "to_dense()"),
    "nested": (lambda x: torch.nested.nested_tensor([x[:2], x[2:3]]), "to_padded_tensor"),
    "jagged": (lambda x: torch.nested.nested_tensor([x[:2], x[2:3]], layout=torch.jagged), "to_padded_tensor"),
    "quantized": (lambda x: torch.quantize_per_tensor(x, 0.1, 0, torch.qint8), "dequantize()"),
    "masked": (lambda x: torch.masked.masked_tensor(x, x > 0), "to_tensor(0)"),
    "masked array": (lambda x: numpy.ma.masked_array(x.numpy()), "filled(0)"),
    "list of tensors": (lambda x: list(x), "torch.stack(x)"),
}
CALLS = {
    "search": lambda index, x: index.search(x, 1),
    "range_search": lambda index, x: index.range_search(x, 1.0),
    "forward": lambda index, x: index(x),
    "graph": lambda index, x: index.graph()(x),
    "add": lambda index, x: index.add(x),
    "add_with_ids": lambda index, x: index.add_with_ids(x, range(900, 904)),
    "update": lambda index, x: index.update(range(4), x),
    "fit": lambda index, x: index.fit(x),
    "train": lambda index, x: index.train(x),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_other_layouts(layout):
    make, conversion = LAYOUTS[layout]
    index = IndexIVFFlat(D, nlist=2).train(X)
    index.add(X)
    x = quietly(lambda: make(X[:4].clone()))
    for call in CALLS.values():
        with pytest.raises(TypeError, match=conversion.replace("(", r"\(").replace(")", r"\)")):
            call(index, x)
    assert index.ntotal == 200


def test_sparse_ids_and_masks_are_refused():
    index = IndexFlatL2(D)
    index.add(X)
    ids = torch.arange(4).to_sparse()
    for name, call in {
        "ids": lambda: index.remove_ids(ids),
        "ids ": lambda: index.add_with_ids(X[:4], ids),
        "ids  ": lambda: index.reconstruct_batch(ids),
        "selector": lambda: SearchParams(selector=ids),
        "radius": lambda: index.range_search(X[:4], ids.float()),
        "mask": lambda: index.graph(k=1)(X[:4], ids.bool()),
    }.items():
        with pytest.raises(TypeError, match=rf"{name.strip()} .*to_dense\(\)"):
            call()
    assert index.ntotal == 200


@pytest.mark.parametrize(
    ("ids", "hint"),
    [
        (torch.ones(4), r"ids must be int64 or int32, got float32; cast it with ids\.long\(\)"),
        (numpy.ones(4, "f4"), r"got float32; cast it with torch\.as_tensor\(ids\)\.long\(\)"),
        ([1.5] * 4, r"got float64; cast it"),
        (["a"] * 4, r"ids must be a torch\.Tensor, a numpy array or a list of numbers, got list"),
        (None, r"got NoneType"),
        ([2**63] * 4, r"ids must be below 2\^63, got 9223372036854775808"),
        ([-1] * 4, r"ids\[0\] is -1"),
        ([0, 2**70, 1, 2], r"ids holds an integer beyond the 64 bits of int64: -2\^63 to 2\^63 - 1"),
        ([2**63, -2, 1, 2], r"ids holds an integer beyond the 64 bits"),  # floats, as numpy has them
        (numpy.array([-(2**64)] * 4), r"ids holds an integer beyond the 64 bits"),
        (numpy.array([1, 2, 3, 4], object), r"ids must be .*, got an array of dtype object"),
        (numpy.array(["a"] * 4), r"got an array of dtype <U1"),
        (torch.ones(4, dtype=torch.complex64), r"ids must be int64 or int32, got complex64$"),
    ],
)
def test_ids_of_another_kind(ids, hint):
    index = IndexFlatL2(D)
    with pytest.raises((TypeError, ValueError), match=hint):
        index.add_with_ids(X[:4], ids)
    assert index.ntotal == 0


@pytest.mark.parametrize(
    ("x", "error", "hint"),
    [
        ([], ValueError, rf"shape \(n, {D}\), got \(0,\); pass torch\.empty\(0, {D}\) for no rows"),
        ((), ValueError, r"got \(0,\)"),
        ([[]], ValueError, r"got \(1, 0\)"),
        (X.to(torch.complex64), TypeError, r"complex vectors are not supported, but torch\.view_as_real\(x\)"),
        (X.numpy().astype("c16"), TypeError, r"complex128; complex vectors are not supported"),
        (X.numpy().astype(object), TypeError, r"list of numbers, got an array of dtype object"),
        (numpy.full((2, D), "a"), TypeError, r"got an array of dtype <U1"),
        ([[2**70] * D], ValueError, r"x holds an integer beyond the 64 bits"),
    ],
)
def test_vectors_of_another_kind(x, error, hint):
    index = IndexFlatL2(D)
    index.add(X)
    for call in (CALLS["search"], CALLS["add"], CALLS["update"], CALLS["range_search"]):
        with pytest.raises(error, match=hint):
            call(index, x)
    assert index.ntotal == 200
    assert index.search(torch.empty(0, D), 1)[1].shape == (0, 1)


@pytest.mark.parametrize("flag", [True, False])
def test_train_takes_the_flags_of_numpy(flag):
    index = IndexPreTransform(D, nn.Identity(), IndexFlatL2(D))
    for part in (index, index.index):
        assert part.train(numpy.bool_(flag)) is part
        assert part.training is flag


@pytest.mark.parametrize("mode", ["x", None, 1, 1.5, numpy.float32(1)])
def test_train_refuses_other_arguments(mode):
    index = IndexIVFFlat(D, nlist=2)
    with pytest.raises(TypeError, match=rf"train takes a bool or float vectors \(n, {D}\), got {type(mode).__name__}"):
        index.train(mode)
    assert index.training
    assert not index.is_trained
