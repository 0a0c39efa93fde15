"""Wrong arguments: the type of the error, the argument, value and remedy in its text, and that nothing changes."""

from __future__ import annotations

import copy
import dataclasses
import re

import numpy
import pytest
import torch

from tests.datasets import PLAIN, normal
from tests.problems import few_training_rows, flat, shared
from tests.states import settings_of, unchanged
from torch_ivf_module import (
    IndexFlatIP,
    IndexFlatL2,
    IndexIVFFlat,
    SearchParams,
    build_file,
    export,
    index_factory,
    load,
    tune,
)
from torch_ivf_module.functional import kmeans

D = PLAIN.d
NLIST = PLAIN.nlist
KINDS = {"ivf": lambda: shared(PLAIN).index, "flat": lambda: flat(PLAIN).index}
each_kind = pytest.mark.parametrize("kind", KINDS)


def refuses(error, *words):
    """A context that expects `error` and, in its text, every one of `words`."""
    return pytest.raises(error, match="(?s)" + "".join(f"(?=.*{re.escape(word)})" for word in words))


# --- vectors ------------------------------------------------------------------------------------------------

CALLS = {
    "search": lambda index, x: index.search(x, 3),
    "range_search": lambda index, x: index.range_search(x, 3.0),
    "add": lambda index, x: index.add(x),
    "add_with_ids": lambda index, x: index.add_with_ids(x, torch.arange(900, 900 + len(x))),
    "update": lambda index, x: index.update(torch.arange(len(x)), x),
    "fit": lambda index, x: index.fit(x),
    "train": lambda index, x: index.train(x),
}
BAD_VECTORS = {
    "too wide": (lambda: normal(5, D + 1), ValueError, ("x", f"{D}", f"(5, {D + 1})")),
    "too narrow": (lambda: normal(5, D - 1), ValueError, ("x", f"{D}", f"(5, {D - 1})")),
    "one dimension": (lambda: normal(D), ValueError, ("x[None]", f"({D},)")),
    "three dimensions": (lambda: normal(2, 5, D), ValueError, ("x", f"(2, 5, {D})")),
    "no dimension": (lambda: torch.tensor(1.0), ValueError, ("x", "()")),
    "int64": (lambda: torch.ones(5, D, dtype=torch.int64), TypeError, ("x", "int64", ".float()")),
    "uint8": (lambda: torch.ones(5, D, dtype=torch.uint8), TypeError, ("x", "uint8", ".float()")),
    "bool": (lambda: torch.ones(5, D, dtype=torch.bool), TypeError, ("x", "bool", ".float()")),
    "complex": (lambda: torch.ones(5, D, dtype=torch.complex64), TypeError, ("x", "complex64")),
    "another device": (
        lambda: torch.ones(5, D, device="meta"),
        (ValueError, RuntimeError),
        ("x", "meta", "cpu"),
    ),
    "words": (lambda: ["a"] * 5, TypeError, ("x", "list")),
    "a list of integers": (lambda: [[1] * D] * 5, TypeError, ("x", "int64", ".float()")),
}


@each_kind
@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("bad", BAD_VECTORS)
def test_vectors_of_the_wrong_kind(kind, call, bad):
    make, error, words = BAD_VECTORS[bad]
    index = KINDS[kind]()
    x = make()
    if x is not None and call in ("add_with_ids", "update") and bad == "no dimension":
        return  # has no length to make ids for
    with unchanged(index), refuses(error, *words):
        CALLS[call](index, x)


@each_kind
@pytest.mark.parametrize("call", ["add", "add_with_ids", "update", "fit"])
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_rows_that_are_not_finite(kind, call, value):
    if (kind, call) == ("flat", "fit"):
        return  # has nothing to fit
    index = KINDS[kind]()
    x = normal(30, D)
    x[11, 2], x[20, 0] = value, value
    with unchanged(index), refuses(ValueError, "x", "11", "finite"):
        CALLS[call](index, x)


@each_kind
def test_forward_of_the_wrong_width(kind):
    index = KINDS[kind]()
    for shape in ((D + 1,), (2, 3, D - 1), ()):
        with unchanged(index), refuses(ValueError, "x", f"{D}", f"{shape}"):
            index(torch.ones(shape))
    with unchanged(index), refuses(TypeError, "x", "int64"):
        index(torch.ones(2, D, dtype=torch.int64))


# --- numbers ------------------------------------------------------------------------------------------------


@each_kind
@pytest.mark.parametrize(
    ("k", "error"), [(0, ValueError), (-3, ValueError), (2.5, TypeError), ("3", TypeError), (None, TypeError)]
)
def test_number_of_results(kind, k, error):
    index = KINDS[kind]()
    came = f"{k}" if error is ValueError else type(k).__name__
    with unchanged(index), refuses(error, "k must be", came):
        index.search(normal(2, D), k)


def test_number_of_results_may_be_any_kind_of_integer():
    index = KINDS["ivf"]()
    assert index.search(normal(2, D), numpy.int64(3))[0].shape == (2, 3)


@each_kind
@pytest.mark.parametrize("radius", [float("nan"), "near", None])
def test_radius(kind, radius):
    index = KINDS[kind]()
    with unchanged(index), pytest.raises((ValueError, TypeError)):
        index.range_search(normal(2, D), radius)


NUMBERS = {
    "nprobe": ([0, -1], [2.5, "8", None, True]),
    "k": ([0, -1], [2.5, "8", None]),
    "max_bytes": ([0, -1], [2.5, "8", None]),
    "max_codes": ([-1], [2.5, "8"]),
}


@pytest.mark.parametrize("name", NUMBERS)
def test_settings(name):
    """Wrong numbers are refused by the constructor and by the attribute, which does not change."""
    index = KINDS["ivf"]()
    values, kinds = NUMBERS[name]
    for value, error in [
        *((value, ValueError) for value in values),
        *((value, TypeError) for value in kinds),
    ]:
        words = (name, str(value) if error is ValueError else type(value).__name__)
        with unchanged(index), refuses(error, *words):
            setattr(index, name, value)
        if value is not None:
            with refuses(error, *words):
                IndexIVFFlat(D, nlist=4, **{name: value})


@pytest.mark.parametrize("name", ["d", "nlist"])
def test_sizes(name):
    for value, error in (
        (0, ValueError),
        (-2, ValueError),
        (2.5, TypeError),
        ("8", TypeError),
        (None, TypeError),
    ):
        words = (name, str(value) if error is ValueError else type(value).__name__)
        with refuses(error, *words):
            IndexIVFFlat(**{"d": D, "nlist": 4, name: value})
    for kind in (IndexFlatL2, IndexFlatIP):
        with refuses(ValueError, "d", "0"):
            kind(0)


@each_kind
@pytest.mark.parametrize("mode", ["fast", "", None, 3])
def test_search_mode(kind, mode):
    index = KINDS[kind]()
    with (
        unchanged(index),
        refuses((ValueError, TypeError), "search_mode", str(mode), "auto", "csr", "matrix"),
    ):
        index.search_mode = mode


@pytest.mark.parametrize("metric", ["L1", "cos", "", None, 0])
def test_metric(metric):
    with refuses((ValueError, TypeError), "metric", str(metric), "l2", "ip", "cosine"):
        IndexIVFFlat(D, nlist=4, metric=metric)


@pytest.mark.parametrize("dtype", [torch.float64, torch.int8, torch.complex64, "float32"])
def test_storage_dtype(dtype):
    for make in (lambda: IndexIVFFlat(D, nlist=4, dtype=dtype), lambda: IndexFlatL2(D, dtype=dtype)):
        with refuses((ValueError, TypeError), "dtype", str(dtype), "float32", "float16", "bfloat16"):
            make()


# --- search parameters --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "error"),
    [
        ({"nprobe": 0}, ValueError),
        ({"nprobe": -4}, ValueError),
        ({"nprobe": 2.5}, (TypeError, ValueError)),
        ({"max_codes": -1}, ValueError),
        ({"max_codes": "many"}, (TypeError, ValueError)),
        ({"profile": "fastest"}, ValueError),
    ],
)
def test_search_parameters(fields, error):
    (name,) = fields
    with refuses(error, name):
        SearchParams(**fields)


def test_search_parameters_name_the_profiles_there_are():
    with refuses(ValueError, "profile", "'fastest'", "'exact'", "'speed'"):
        SearchParams(profile="fastest")


def test_search_parameters_are_frozen():
    params = SearchParams(nprobe=3)
    with pytest.raises(dataclasses.FrozenInstanceError):
        params.nprobe = 4
    assert params == SearchParams(nprobe=3)
    assert hash(params) == hash(SearchParams(nprobe=3))
    with pytest.raises(TypeError):
        SearchParams(probes=3)


@each_kind
def test_parameters_of_another_type(kind):
    index = KINDS[kind]()
    for call in (index.search, index.range_search):
        with unchanged(index), refuses(TypeError, "params", "SearchParams", "dict"):
            call(normal(2, D), 3, params={"nprobe": 3})


@each_kind
def test_filters_of_another_shape_or_dtype(kind):
    index, x = KINDS[kind](), normal(3, D)
    for name, value, error, words in (
        ("exclude", torch.arange(3), ValueError, ("(3, m)", "(3,)", "exclude[:, None]")),
        ("exclude", torch.zeros(7, 2, dtype=torch.int64), ValueError, ("3 queries", "(7, 2)")),
        ("selector", torch.ones(9, dtype=torch.uint8), TypeError, ("uint8", "selector.long()", ".bool()")),
        ("selector", torch.tensor([[1, 2]]), ValueError, ("(1, 2)", "a list of 3 tensors")),
    ):
        with unchanged(index), refuses(error, name, *words):
            index.search(x, 2, params=SearchParams(**{name: value}))


# --- ids ----------------------------------------------------------------------------------------------------

BAD_IDS = {
    "too few": (lambda: torch.arange(4), ValueError, ("ids", "4", "5")),
    "too many": (lambda: torch.arange(6), ValueError, ("ids", "6", "5")),
    "two dimensions": (lambda: torch.arange(5)[None], ValueError, ("ids", "(1, 5)")),
    "floats": (lambda: torch.arange(5.0), TypeError, ("ids", "float32", "long()")),
    "int16": (lambda: torch.arange(5, dtype=torch.int16), TypeError, ("ids", "int16", "long()")),
    "a mask": (lambda: torch.ones(5, dtype=torch.bool), TypeError, ("ids", "bool")),
    "another device": (
        lambda: torch.arange(5, device="meta"),
        (ValueError, RuntimeError),
        ("ids", "meta", "cpu"),
    ),
    "a set": (lambda: {1, 2, 3, 4, 5}, TypeError, ("ids", "set")),
    "minus one": (lambda: torch.tensor([0, 1, 2, -1, 4]), ValueError, ("ids", "-1", "3")),
}


@each_kind
@pytest.mark.parametrize("call", ["add_with_ids", "update"])
@pytest.mark.parametrize("bad", BAD_IDS)
def test_ids_of_the_wrong_kind(kind, call, bad):
    make, error, words = BAD_IDS[bad]
    index = KINDS[kind]()
    x = normal(5, D)
    with unchanged(index), refuses(error, *words):
        index.add_with_ids(x, make()) if call == "add_with_ids" else index.update(make(), x)


@each_kind
@pytest.mark.parametrize("bad", ["two dimensions", "floats", "int16", "another device", "a set"])
def test_removing_ids_of_the_wrong_kind(kind, bad):
    make, error, words = BAD_IDS[bad]
    index = KINDS[kind]()
    with unchanged(index), refuses(error, *words):
        index.remove_ids(make())


@each_kind
def test_a_mask_of_two_dimensions(kind):
    index = KINDS[kind]()
    with unchanged(index), refuses(ValueError, "ids", "(2, 3)"):
        index.remove_ids(torch.ones(2, 3, dtype=torch.bool))


@each_kind
def test_updating_ids_that_are_unknown_or_given_twice(kind):
    index = KINDS[kind]()
    with unchanged(index), refuses((KeyError, ValueError), "ids", "70000"):
        index.update(torch.tensor([3, 70000]), normal(2, D))
    with unchanged(index), refuses(ValueError, "ids"):
        index.update(torch.tensor([3, 3]), normal(2, D))


@each_kind
@pytest.mark.parametrize("id", [PLAIN.nb, -1, 10**12])
def test_reconstructing_unknown_ids(kind, id):
    index = KINDS[kind]()
    with unchanged(index), refuses(KeyError, str(id)):
        index.reconstruct(id)


@each_kind
def test_reconstructing_ranges(kind):
    index = KINDS[kind]()
    with unchanged(index), refuses(KeyError, str(PLAIN.nb)):
        index.reconstruct_n(PLAIN.nb - 2, 5)
    with unchanged(index), refuses(ValueError, "n", "-1"):
        index.reconstruct_n(0, -1)
    for id in (2.5, "3", None):
        with unchanged(index), pytest.raises((TypeError, KeyError, ValueError)):
            index.reconstruct(id)


# --- training -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("call", ["search", "range_search", "add", "add_with_ids"])
def test_an_untrained_index(call):
    index = IndexIVFFlat(D, nlist=4)
    with unchanged(index), refuses(RuntimeError, "train"):
        CALLS[call](index, normal(5, D))
    with unchanged(index), refuses(RuntimeError, "train"):
        index(normal(5, D))


def test_training_with_too_few_rows():
    index = shared(PLAIN).index
    for rows in (0, 1, NLIST - 1):
        with unchanged(index), refuses(ValueError, "x", f"{rows}", f"{NLIST}"):
            index.train(normal(rows, D))


@pytest.mark.parametrize("name", ["niter", "max_points_per_centroid"])
def test_training_settings(name):
    index = shared(PLAIN).index
    for value in (0, -1, 2.5):
        with unchanged(index), few_training_rows(), refuses((ValueError, TypeError), name):
            index.train(normal(500, D), **{name: value})


@each_kind
def test_training_mode_that_is_no_flag(kind):
    index = KINDS[kind]()
    for mode in ("yes", None, [1.0]):
        with unchanged(index), pytest.raises((TypeError, ValueError)):
            index.train(mode)
    with unchanged(index), pytest.raises(TypeError):
        index.train(True, niter=3)
    with unchanged(index), pytest.raises(TypeError):
        index.train(normal(500, D), iterations=3)


def test_kmeans_arguments():
    with refuses(ValueError, "x", "3", "4"):
        kmeans(normal(3, 2), 4)
    with refuses(ValueError, "nlist", "0"):
        kmeans(normal(3, 2), 0)
    with refuses(ValueError, "metric", "cosinus"):
        kmeans(normal(9, 2), 2, metric="cosinus")
    with refuses(ValueError, "start", "(2, 4)", "(2, 3)"):
        kmeans(normal(9, 4), 2, start=normal(2, 3))


# --- the rest of the constructor ----------------------------------------------------------------------------


@each_kind
@pytest.mark.parametrize(("name", "value"), [("metric", "ip"), ("d", D + 1), ("d", float(D))])
def test_what_vectors_depend_on_cannot_be_changed(kind, name, value):
    index = KINDS[kind]()
    words = (repr(getattr(index, name)), f"make another index with {name}={value!r}")
    with unchanged(index), refuses(AttributeError, name, *words):
        setattr(index, name, value)
    setattr(index, name, getattr(index, name))


def test_unknown_arguments():
    for make in (IndexIVFFlat, IndexFlatL2, IndexFlatIP):
        with pytest.raises(TypeError, match="probes"):
            make(D, probes=3)


def test_a_refused_setting_changes_nothing():
    index = shared(PLAIN).index
    before = settings_of(index)
    for name in ("nprobe", "k", "max_bytes"):
        with pytest.raises(ValueError, match=name):
            setattr(index, name, 0)
    assert settings_of(index) == before


# --- files, and functions that take an index ----------------------------------------------------------------


@each_kind
def test_one_id_that_is_not_in_a_list(kind):
    index = KINDS[kind]()
    with unchanged(index), refuses(ValueError, "ids", "()", "pass [7]"):
        index.remove_ids(7)
    for one in (torch.tensor(7), torch.tensor(7, device="meta")):
        with unchanged(index), refuses(ValueError, "ids", "()", "pass ids[None]"):
            index.remove_ids(one)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", ("empty", "index.save")),
        (b"hello", ("not written by index.save",)),
    ],
)
@pytest.mark.parametrize("suffix", [".pt", ".index", ""])
def test_a_file_that_is_no_index(content, words, suffix, tmp_path):
    path = tmp_path / f"found{suffix}"
    path.write_bytes(content)
    with refuses(ValueError, str(path), "cannot be read as an index", *words):
        load(path)


def test_a_file_with_another_object(tmp_path):
    path = tmp_path / "tensor.pt"
    torch.save(torch.ones(3), path)
    with refuses(ValueError, str(path), "Tensor", "not an index"):
        load(path)


def test_building_over_the_file_of_vectors(tmp_path):
    path = tmp_path / "x.npy"
    numpy.save(path, normal(50, D).numpy())
    before = path.read_bytes()
    for other in (path, tmp_path / "." / "x.npy"):
        with refuses(ValueError, "overwrite", "x.npy"):
            build_file(path, other, IndexFlatL2(D))
    with refuses(FileNotFoundError, "no such folder", "nowhere"):
        build_file(path, tmp_path / "nowhere" / "index.pt", IndexFlatL2(D))
    assert path.read_bytes() == before


def test_the_order_of_arguments():
    with refuses(TypeError, "description", "IVF512,Flat", "int"):
        index_factory("IVF16,Flat", 64)
    for write in (export.to_torchscript, export.to_exported, export.to_onnx):
        with refuses(TypeError, "model must be a torch.nn.Module", "str"):
            write("model.onnx", torch.nn.Linear(2, 2))


def test_opening_an_exported_file_that_is_not_there(tmp_path):
    for format in export.FORMATS:
        with refuses(FileNotFoundError, "no such file", "model.pt2"):
            export.runner(tmp_path / "model.pt2", format)
    with refuses(ValueError, "format", "'onx'", "'onnx'"):
        export.runner(tmp_path / "model.pt2", "onx")


@pytest.mark.parametrize(("recall", "error"), [("0.9", TypeError), (95, ValueError), (0, ValueError)])
def test_the_recall_to_tune_for(recall, error):
    index = shared(PLAIN).index
    with unchanged(index), refuses(error, "target_recall", "str" if error is TypeError else str(recall)):
        tune(index, normal(3, D), target_recall=recall)


def test_numbers_of_numpy():
    index = copy.deepcopy(shared(PLAIN).index)
    tune(index, normal(3, D), k=2, target_recall=numpy.float32(0.5))
    index.auto_rebalance = numpy.float32(1.5)
    assert index.auto_rebalance == 1.5
