"""load_state_dict: sizes, nesting, strict or not, assign, mapped files, states that do not fit."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from tests.datasets import PLAIN, normal
from tests.kinds import BUFFERS, STORED, Deep, each_stored, fresh, same_answers
from tests.oracle import check, probed, stored_rows
from tests.problems import few_training_rows, shared
from tests.states import same_state, snapshot, unchanged
from torch_ivf_module.index import IndexIVF

NESTINGS = {
    "alone": (lambda index: index, lambda module: module),
    "in a sequence": (lambda index: nn.Sequential(nn.Linear(16, 16), index), lambda module: module[1]),
    "two levels down": (Deep, lambda module: module.index),
}


TARGETS = {
    "fresh": lambda index: fresh(index),
    "filled otherwise": lambda index: _filled(fresh(index)),
    "other nlist": lambda index: (
        _filled(fresh(index, nlist=3, nprobe=3)) if hasattr(index, "nlist") else fresh(index)
    ),
}


def _filled(index):
    with few_training_rows():
        if isinstance(index, IndexIVF):
            index.train(normal(200, index.d, seed=5))
    index.add(normal(123, index.d, seed=6))
    index.search(normal(2, index.d), 1)
    index.add(normal(3, index.d, seed=7))
    return index


@each_stored
@pytest.mark.parametrize("nesting", NESTINGS)
@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("assign", [True, False])
def test_load_state_dict(kind, nesting, target, strict, assign):
    wrap, unwrap = NESTINGS[nesting]
    index, base, queries = STORED[kind]()
    index.remove_ids(torch.arange(10))
    index.add(base[:2])
    source, module = wrap(index), wrap(TARGETS[target](index))
    result = module.load_state_dict(source.state_dict(), strict=strict, assign=assign)
    assert result.missing_keys == []
    assert result.unexpected_keys == []
    loaded = unwrap(module)
    assert same_state(snapshot(module), snapshot(source))
    assert loaded.ntotal == index.ntotal
    if isinstance(index, IndexIVF):
        assert loaded.nlist == index.nlist
        loaded.nprobe = index.nprobe
    same_answers(loaded, index, queries)
    with unchanged(index):
        loaded.add(base[:1])
        loaded.remove_ids(torch.arange(30))
    assert loaded.ntotal == index.ntotal + 1 - 20
    assert int(loaded.list_ids.max()) == len(base) + 2


@each_stored
@pytest.mark.parametrize("nesting", NESTINGS)
def test_load_into_an_index_made_on_the_meta_device(kind, nesting):
    wrap, unwrap = NESTINGS[nesting]
    index, base, queries = STORED[kind]()
    source = wrap(index)
    with torch.device("meta"):
        module = wrap(fresh(index))
    assert unwrap(module).centroids.is_meta
    assert f"{index.d}" in repr(unwrap(module))
    module.load_state_dict(source.state_dict(), assign=True)
    loaded = unwrap(module)
    assert not any(value.is_meta for value in module.state_dict().values())
    same_answers(loaded, index, queries)
    loaded.add(base[:4])
    assert loaded.ntotal == index.ntotal + 4


@each_stored
@pytest.mark.parametrize("assign", [True, False])
def test_load_from_a_mapped_file(kind, assign, tmp_path):
    index, base, queries = STORED[kind]()
    torch.save(index.state_dict(), tmp_path / "state.pt")
    state = torch.load(tmp_path / "state.pt", mmap=True, weights_only=True)
    loaded = fresh(index)
    loaded.load_state_dict(state, assign=assign)
    same_answers(loaded, index, queries)
    loaded.add(base[:4])
    loaded.remove_ids(torch.arange(3))
    assert loaded.ntotal == index.ntotal + 1
    reloaded = torch.load(tmp_path / "state.pt", weights_only=True)
    assert same_state(reloaded, snapshot(index))


@pytest.mark.parametrize("assign", [True, False])
def test_loading_converts_to_the_storage_dtype_unless_assigned(assign):
    index, _, _ = shared(PLAIN, "l2", torch.float32)
    loaded = fresh(index, dtype=torch.float16)
    loaded.load_state_dict(index.state_dict(), assign=assign)
    expected = torch.float32 if assign else torch.float16
    assert loaded.packed_embeddings.dtype == expected
    assert torch.equal(loaded.packed_embeddings, index.packed_embeddings.to(expected))
    loaded.add(normal(1, PLAIN.d))
    assert loaded.packed_embeddings.dtype == expected


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("nesting", NESTINGS)
def test_without_next_id_ids_continue_after_the_largest(strict, nesting):
    wrap, unwrap = NESTINGS[nesting]
    index, base, _ = shared()
    index.add_with_ids(base[:2], torch.tensor([7000, -50]))
    state = wrap(index).state_dict()
    del state[next(name for name in state if name.endswith("next_id"))]
    module = wrap(fresh(index))
    module.load_state_dict(state, strict=strict)
    loaded = unwrap(module)
    assert int(loaded.next_id) == 7001
    loaded.add(base[:1])
    assert int(loaded.list_ids.max()) == 7001


@pytest.mark.parametrize("assign", [True, False])
@pytest.mark.parametrize("name", ["list_ids", "packed_embeddings", "centroids"])
def test_loading_a_state_clears_derived_data(name, assign):
    """A state of the same sizes with one different buffer is loaded after a search."""
    index, _, queries = shared()
    index.search(queries, 10)
    state = snapshot(index)
    state[name] = state[name] + 7 if name == "list_ids" else state[name].flip(1)
    index.load_state_dict(state, assign=assign)
    check(index.search(queries, 10), queries, stored_rows(index), "l2", 10, probed(index, queries))
    index.get_buffer(name).copy_(state[name].flip(0))
    if name == "list_ids":  # overwritten ids are refused, since they may be averages of ids
        with pytest.raises(RuntimeError, match=r"list_ids.*AveragedModel"):
            index.search(queries, 10)
        return
    check(index.search(queries, 10), queries, stored_rows(index), "l2", 10, probed(index, queries))


def test_a_parent_reports_missing_and_unexpected_keys():
    index, _, _ = shared()
    parent = Deep(index)
    state = parent.state_dict()
    state["stray"] = torch.zeros(1)
    del state["encoder.bias"]
    result = Deep(fresh(index)).load_state_dict(state, strict=False)
    assert result.missing_keys == ["encoder.bias"]
    assert result.unexpected_keys == ["stray"]
    with pytest.raises(RuntimeError, match=r"(?s)stray.*encoder\.bias|encoder\.bias.*stray"):
        Deep(fresh(index)).load_state_dict(state)


@pytest.mark.parametrize("name", BUFFERS[:4])
def test_a_state_with_missing_buffers_is_not_loaded_in_part(name):
    index, _, _ = shared()
    state = index.state_dict()
    del state[name]
    target = _filled(fresh(index, nlist=3, nprobe=3))
    with unchanged(target), pytest.raises(RuntimeError, match=name):
        target.load_state_dict(state)
    # With strict=False the old buffer may be kept if all buffers are then consistent; here they are not.
    with unchanged(target):
        try:
            result = target.load_state_dict(state, strict=False)
        except RuntimeError as error:
            assert name in str(error)  # noqa: PT017
        else:
            assert name in result.missing_keys


def test_a_foreign_state_with_strict_false_does_not_change_the_index():
    target = _filled(fresh(shared()[0]))
    with unchanged(target):
        result = target.load_state_dict({}, strict=False)
    assert set(result.missing_keys) >= set(BUFFERS[:4])


def _with(**changes):
    def change(state):
        for name, function in changes.items():
            state[name] = function(state[name])

    return change


def _set(position, value):
    def change(tensor):
        tensor = tensor.clone()
        tensor[position] = value
        return tensor

    return change


MISFITS = {
    "offsets fall": (_with(list_offsets=_set(3, 10**6)), "list_offsets"),
    "offsets are negative": (_with(list_offsets=_set(1, -4)), "list_offsets"),
    "offsets start late": (_with(list_offsets=_set(0, 1)), "list_offsets"),
    "offsets end early": (_with(list_offsets=lambda x: torch.cat([x[:-1], x[-1:] - 1])), "list_offsets"),
    "offsets end late": (_with(list_offsets=lambda x: torch.cat([x[:-1], x[-1:] + 1])), "list_offsets"),
    "offsets too few": (_with(list_offsets=lambda x: torch.cat([x[:3], x[-1:]])), "list_offsets"),
    "offsets missing": (_with(list_offsets=lambda x: x[:0]), "list_offsets"),
    "offsets are floats": (_with(list_offsets=lambda x: x.float()), "list_offsets"),
    "offsets have two dimensions": (_with(list_offsets=lambda x: x[None]), "list_offsets"),
    "ids too few": (_with(list_ids=lambda x: x[1:]), "list_ids"),
    "ids are floats": (_with(list_ids=lambda x: x.float()), "list_ids"),
    "ids are int32": (_with(list_ids=lambda x: x.int()), "list_ids"),
    "an id is -1": (_with(list_ids=_set(5, -1)), "list_ids"),
    "vectors too few": (_with(packed_embeddings=lambda x: x[1:]), "packed_embeddings"),
    "vectors of another d": (_with(packed_embeddings=lambda x: x[:, 1:]), "packed_embeddings"),
    "vectors are integers": (_with(packed_embeddings=lambda x: x.int()), "packed_embeddings"),
    "vectors are flat": (_with(packed_embeddings=lambda x: x.flatten()), "packed_embeddings"),
    "centroids too few": (_with(centroids=lambda x: x[1:]), "centroids"),
    "centroids of another d": (_with(centroids=lambda x: x[:, 1:]), "centroids"),
    "centroids are integers": (_with(centroids=lambda x: x.int()), "centroids"),
    "centroids of both another d": (
        _with(centroids=lambda x: x[:, 1:], packed_embeddings=lambda x: x[:, 1:]),
        "centroids",
    ),
    "next_id is a float": (_with(next_id=lambda x: x.double()), "next_id"),
    "next_id is negative": (_with(next_id=lambda x: x - 10**6), "next_id"),
    "next_id has a dimension": (_with(next_id=lambda x: x.expand(2)), "next_id"),
}


@pytest.mark.parametrize("misfit", MISFITS)
@pytest.mark.parametrize("nesting", ["alone", "two levels down"])
@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("assign", [True, False])
def test_state_that_does_not_fit_is_refused(misfit, nesting, strict, assign):
    change, word = MISFITS[misfit]
    wrap, _ = NESTINGS[nesting]
    index, _, queries = shared()
    state = index.state_dict()
    change(state)
    prefix = next(iter(name for name in wrap(index).state_dict() if name.endswith("centroids")))[
        : -len("centroids")
    ]
    target = _filled(fresh(index))
    module = wrap(target)
    with unchanged(target), pytest.raises(RuntimeError, match=word):
        module.load_state_dict(
            {prefix + name: value for name, value in state.items()}, strict=False, assign=assign
        )
    if strict and nesting == "alone":
        with unchanged(target), pytest.raises(RuntimeError, match=word):
            module.load_state_dict(state, assign=assign)
    target.search(queries, 3)


def test_a_next_id_below_the_ids_is_refused_or_corrected():
    """Whatever next_id a state has, `add` must not assign an id that exists."""
    index, base, _ = shared()
    state = index.state_dict()
    state["next_id"] = torch.tensor(3)
    target = fresh(index)
    try:
        target.load_state_dict(state)
    except RuntimeError as error:
        assert "next_id" in str(error)  # noqa: PT017
        return
    target.add(base[:1])
    assert len(target.list_ids.unique()) == target.ntotal
