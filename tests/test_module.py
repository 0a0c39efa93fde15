"""The index as a torch.nn.Module: buffers, state_dict, moving, copying, gradients, life inside a parent."""

from __future__ import annotations

import io
import pickle
import threading
from collections import OrderedDict
from copy import deepcopy

import pytest
import torch
from torch import nn

from tests.problems import (
    DTYPES,
    METRICS,
    MODES,
    PLAIN,
    agree,
    check,
    comparable,
    few_training_rows,
    flat,
    held,
    ivf,
    normal,
    probed,
    problem,
    same_state,
    settings_of,
    shared,
    snapshot,
    unchanged,
)
from torch_ivf_module import IndexFlatIP, IndexFlatL2, IndexIVFFlat
from torch_ivf_module.functional.metric import exact_scores

BUFFERS = ["centroids", "packed_embeddings", "list_offsets", "list_ids", "next_id"]
KINDS = {
    "l2": lambda: shared(PLAIN, "l2"),
    "cosine": lambda: shared(PLAIN, "cosine"),
    "half": lambda: shared(PLAIN, "ip", torch.float16),
    "flat": lambda: flat(PLAIN, "l2"),
}
each_kind = pytest.mark.parametrize("kind", KINDS)
each_metric = pytest.mark.parametrize("metric", METRICS)


def fresh(index, **settings):
    """An empty index of the same kind, by default with another number of lists."""
    settings = {"dtype": index.packed_embeddings.dtype, **settings}
    if isinstance(index, IndexIVFFlat):
        return IndexIVFFlat(
            index.d, metric=index.metric, **{"nlist": index.nlist, "nprobe": index.nprobe, **settings}
        )
    return type(index)(index.d, **settings)


def same_answers(one, other, queries):
    agree(one.search(queries, 10), other.search(queries, 10), rtol=1e-6, atol=1e-6)


# --- buffers ------------------------------------------------------------------------------------------------


@each_kind
def test_state_dict_holds_exactly_the_documented_buffers(kind):
    index, _, queries = KINDS[kind]()
    index.search(queries, 3)
    index.range_search(queries, 1.0)
    assert list(index.state_dict()) == BUFFERS
    assert set(dict(index.named_buffers())) >= set(BUFFERS)
    assert not list(index.parameters())
    state = index.state_dict()
    lists = len(state["list_offsets"]) - 1
    assert state["centroids"].dtype == torch.float32
    assert state["centroids"].shape[1] == index.d
    assert state["packed_embeddings"].shape == (index.ntotal, index.d)
    assert state["list_offsets"].dtype == state["list_ids"].dtype == state["next_id"].dtype == torch.int64
    assert state["list_ids"].shape == (index.ntotal,)
    assert state["next_id"].shape == ()
    assert int(state["next_id"]) == index.ntotal
    assert state["list_offsets"][-1] == index.ntotal
    if kind != "flat":
        assert lists == index.nlist == len(state["centroids"])
    for name, value in state.items():
        assert torch.equal(getattr(index, name), value)


@pytest.mark.parametrize(
    "make", [lambda: IndexIVFFlat(8, nlist=4), lambda: IndexFlatL2(8), lambda: IndexFlatIP(8)]
)
def test_buffers_are_empty_tensors_at_first(make):
    index = make()
    state = index.state_dict()
    assert list(state) == BUFFERS
    for name in ("centroids", "packed_embeddings", "list_ids"):
        assert state[name].numel() == 0
    assert int(state["next_id"]) == 0
    assert index.ntotal == 0
    assert index.is_trained == isinstance(index, (IndexFlatL2, IndexFlatIP))


def test_a_parent_that_reads_the_buffers_sees_what_was_just_added():
    index, base, _ = shared()
    parent = Deep(index)
    for read in (
        lambda: dict(parent.named_buffers())["memory.inner.index.list_ids"],
        lambda: next(buffer for buffer in parent.buffers() if buffer.shape == (index.ntotal, PLAIN.d)),
        lambda: parent.state_dict()["memory.inner.index.list_ids"],
        lambda: parent.get_buffer("memory.inner.index.list_ids"),
        lambda: parent.double().index.list_ids,
    ):
        index.add(base[:1])
        assert len(read()) == index.ntotal


def test_trained_is_read_off_the_buffers():
    index, _, _ = shared()
    other = fresh(index)
    assert not other.is_trained
    assert other.ntotal == 0
    other.load_state_dict(index.state_dict())
    assert other.is_trained
    assert other.ntotal == index.ntotal


@each_metric
def test_constructor_arguments_and_defaults(metric):
    index = IndexIVFFlat(8, nlist=4, metric=metric, k=3, dtype=torch.float16, device="cpu")
    assert (index.d, index.nlist, index.nprobe, index.k, index.metric) == (8, 4, 4, 3, metric)
    assert index.search_mode == "auto"
    assert index.max_codes is None
    assert index.max_bytes == 256 << 20
    assert IndexIVFFlat(8, nlist=100).nprobe == 8
    assert IndexIVFFlat(8, nlist=100).k == 10
    assert IndexFlatL2(8).metric == "l2"
    assert IndexFlatIP(8).metric == "ip"


def test_extra_repr_tells_what_the_index_is():
    index, _, _ = shared(PLAIN, "cosine", torch.float16)
    text = repr(index)
    for word in (
        "cosine",
        f"{index.d}",
        f"nlist={index.nlist}",
        f"nprobe={index.nprobe}",
        f"{index.ntotal}",
        "float16",
    ):
        assert word in text
    assert f"{PLAIN.d}" in repr(IndexFlatL2(PLAIN.d))


# --- moving and copying -------------------------------------------------------------------------------------


@pytest.mark.parametrize("start", DTYPES, ids=str)
@pytest.mark.parametrize("end", DTYPES, ids=str)
@each_metric
def test_storage_dtype_changes_and_centroids_stay_float32(start, end, metric):
    index, _, queries = shared(PLAIN, metric, start)
    centroids, rows = index.centroids.clone(), index.packed_embeddings.clone()
    change = {
        torch.float32: nn.Module.float,
        torch.float16: nn.Module.half,
        torch.bfloat16: nn.Module.bfloat16,
    }
    index.search(queries, 10)
    for moved in (
        change[end](deepcopy(index)),
        deepcopy(index).to(end),
        nn.Sequential(deepcopy(index)).to(end)[0],
    ):
        assert moved.packed_embeddings.dtype == end
        assert torch.equal(moved.packed_embeddings, rows.to(end))
        assert torch.equal(moved.centroids, centroids)
        assert moved.centroids.dtype == torch.float32
        assert moved.list_ids.dtype == moved.list_offsets.dtype == moved.next_id.dtype == torch.int64
        check(moved.search(queries, 10), queries, held(moved), metric, 10, probed(moved, queries))
        moved.add(normal(5, index.d))
        assert moved.packed_embeddings.dtype == end
        assert moved.ntotal == index.ntotal + 5


def test_double_is_not_a_storage_type():
    """float64 is no storage type: asking for it keeps what there is or says so, and searching works."""
    index, _, queries = shared()
    before = snapshot(index)
    try:
        index.double()
    except (TypeError, ValueError) as error:
        assert "float64" in str(error)  # noqa: PT017
    assert index.centroids.dtype == torch.float32
    assert same_state(snapshot(index), before)
    index.search(queries, 3)


def test_to_moves_in_place_and_returns_the_module():
    index, _, _ = shared()
    assert index.to("cpu") is index
    assert index.to(torch.float16) is index
    assert index.eval() is index


def _pickled(index):
    return pickle.loads(pickle.dumps(index))


def _torch_saved(index):
    file = io.BytesIO()
    torch.save(index, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@each_kind
@pytest.mark.parametrize("copy", [deepcopy, _pickled, _torch_saved], ids=["deepcopy", "pickle", "torch.save"])
@pytest.mark.parametrize("staged", [False, True])
def test_copies_are_equal_and_independent(kind, copy, staged):
    index, base, queries = KINDS[kind]()
    index.k, index.max_bytes = 4, 1 << 20
    if staged:
        index.add(base[:3] + 1)
    other = copy(index)
    assert type(other) is type(index)
    assert (other.k, other.max_bytes) == (4, 1 << 20)
    assert settings_of(other) == settings_of(index)
    assert same_state(snapshot(other), snapshot(index))
    same_answers(other, index, queries)
    with unchanged(index):
        other.add(base[:7])
        other.remove_ids(torch.arange(20))
        other.k = 1
    assert other.ntotal == index.ntotal + 7 - 20
    with unchanged(other):
        index.reset()


@each_kind
def test_an_untrained_index_can_be_copied(kind):
    index = fresh(KINDS[kind]()[0])
    for copy in (deepcopy, _pickled, _torch_saved):
        assert same_state(snapshot(copy(index)), snapshot(index))


def test_share_memory():
    index, _, queries = shared()
    expected = index.search(queries, 10)
    assert index.share_memory() is index
    assert all(buffer.is_shared() for name, buffer in index.named_buffers() if name in BUFFERS)
    agree(index.search(queries, 10), expected, rtol=1e-6)


# --- load_state_dict ----------------------------------------------------------------------------------------


class Deep(nn.Module):
    """An index two levels down, beside a layer of its own."""

    def __init__(self, index):
        super().__init__()
        self.encoder = nn.Linear(16, 16)
        self.memory = nn.ModuleDict({"inner": nn.Sequential(OrderedDict(index=index))})

    @property
    def index(self):
        return self.memory["inner"].index


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
        if isinstance(index, IndexIVFFlat):
            index.train(normal(200, index.d, seed=5))
    index.add(normal(123, index.d, seed=6))
    index.search(normal(2, index.d), 1)
    index.add(normal(3, index.d, seed=7))
    return index


@each_kind
@pytest.mark.parametrize("nesting", NESTINGS)
@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("assign", [True, False])
def test_load_state_dict(kind, nesting, target, strict, assign):
    wrap, unwrap = NESTINGS[nesting]
    index, base, queries = KINDS[kind]()
    index.remove_ids(torch.arange(10))
    index.add(base[:2])
    source, module = wrap(index), wrap(TARGETS[target](index))
    result = module.load_state_dict(source.state_dict(), strict=strict, assign=assign)
    assert result.missing_keys == []
    assert result.unexpected_keys == []
    loaded = unwrap(module)
    assert same_state(snapshot(module), snapshot(source))
    assert loaded.ntotal == index.ntotal
    if isinstance(index, IndexIVFFlat):
        assert loaded.nlist == index.nlist
        loaded.nprobe = index.nprobe
    same_answers(loaded, index, queries)
    with unchanged(index):
        loaded.add(base[:1])
        loaded.remove_ids(torch.arange(30))
    assert loaded.ntotal == index.ntotal + 1 - 20
    assert int(loaded.list_ids.max()) == len(base) + 2


@each_kind
@pytest.mark.parametrize("nesting", NESTINGS)
def test_load_into_an_index_made_on_the_meta_device(kind, nesting):
    wrap, unwrap = NESTINGS[nesting]
    index, base, queries = KINDS[kind]()
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


@each_kind
@pytest.mark.parametrize("assign", [True, False])
def test_load_from_a_mapped_file(kind, assign, tmp_path):
    index, base, queries = KINDS[kind]()
    torch.save(index.state_dict(), tmp_path / "state.pt")
    state = torch.load(tmp_path / "state.pt", mmap=True, weights_only=True)
    loaded = fresh(index)
    loaded.load_state_dict(state, assign=assign)
    same_answers(loaded, index, queries)
    loaded.add(base[:4])
    loaded.remove_ids(torch.arange(3))
    assert loaded.ntotal == index.ntotal + 1
    again = torch.load(tmp_path / "state.pt", weights_only=True)
    assert same_state(again, snapshot(index))


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
def test_without_next_id_numbering_goes_on_after_the_largest_id(strict, nesting):
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
def test_nothing_computed_from_an_older_state_is_used(name, assign):
    """A state of the same sizes that differs in one part, loaded after a search."""
    index, _, queries = shared()
    index.search(queries, 10)
    state = snapshot(index)
    state[name] = state[name] + 7 if name == "list_ids" else state[name].flip(1)
    index.load_state_dict(state, assign=assign)
    check(index.search(queries, 10), queries, held(index), "l2", 10, probed(index, queries))
    index.get_buffer(name).copy_(state[name].flip(0))
    if name == "list_ids":  # ids that were written over may be an average, which nobody can tell from ids
        with pytest.raises(RuntimeError, match=r"list_ids.*AveragedModel"):
            index.search(queries, 10)
        return
    check(index.search(queries, 10), queries, held(index), "l2", 10, probed(index, queries))


def test_a_parent_still_hears_of_missing_and_unexpected_keys():
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
def test_a_state_with_a_part_missing_is_not_half_loaded(name):
    index, _, _ = shared()
    state = index.state_dict()
    del state[name]
    target = _filled(fresh(index, nlist=3, nprobe=3))
    with unchanged(target), pytest.raises(RuntimeError, match=name):
        target.load_state_dict(state)
    # Without strict a part may be kept from before where the whole then fits together; here it does not.
    with unchanged(target):
        try:
            result = target.load_state_dict(state, strict=False)
        except RuntimeError as error:
            assert name in str(error)  # noqa: PT017
        else:
            assert name in result.missing_keys


def test_a_state_of_something_else_leaves_a_lenient_index_alone():
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


def test_next_id_below_the_ids_never_gives_an_id_twice():
    """A hand-made state may say anything; the numbers that `add` gives out must still be new."""
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


# --- train and eval, and forward ----------------------------------------------------------------------------


def test_train_with_a_flag_switches_mode_and_with_a_tensor_fits():
    index = IndexIVFFlat(16, nlist=4)
    assert index.training
    assert index.train(False) is index
    assert not index.training
    assert index.train() is index
    assert index.training
    index.train(mode=False)
    assert not index.training
    assert not index.is_trained
    assert index.eval() is index
    index.train(normal(300, 16))
    assert index.is_trained
    assert not index.training, "fitting must not switch the mode"
    twin = IndexIVFFlat(16, nlist=4)
    twin.fit(normal(300, 16))
    assert torch.equal(twin.centroids, index.centroids)
    assert twin.training


@pytest.mark.parametrize("kind", [IndexFlatL2, IndexFlatIP])
def test_flat_indexes_take_training_calls_too(kind):
    index = kind(16)
    index.train(normal(5, 16))
    index.fit(normal(5, 16))
    index.eval()
    assert not index.training
    index.train()
    assert index.training
    assert index.is_trained
    assert index.ntotal == 0


def test_in_a_sequence_with_an_encoder():
    torch.manual_seed(0)
    encoder = nn.Sequential(nn.Linear(24, 32), nn.ReLU(), nn.Linear(32, 16))
    index, _, _ = shared()
    model = nn.Sequential(encoder, index).eval()
    assert not index.training
    assert not encoder.training
    x = normal(9, 24)
    with torch.no_grad():
        D, I = model(x)
        agree((D, I), index.search(encoder(x), index.k), rtol=1e-6)
    twin = nn.Sequential(
        nn.Sequential(nn.Linear(24, 32), nn.ReLU(), nn.Linear(32, 16)),
        IndexIVFFlat(16, nlist=PLAIN.nlist, nprobe=PLAIN.nprobe),
    )
    twin.load_state_dict(model.state_dict())
    with torch.no_grad():
        agree(twin.eval()(x), (D, I), rtol=1e-6)
    model.train()
    assert index.training
    assert index.ntotal == PLAIN.nb


@each_kind
@pytest.mark.parametrize("shape", [(16,), (1, 16), (7, 16), (2, 3, 16), (2, 0, 16), (2, 1, 2, 16)], ids=str)
def test_forward_takes_any_leading_shape(kind, shape):
    index, _, _ = KINDS[kind]()
    x = normal(*shape)
    D, I = index(x)
    assert D.shape == I.shape == (*shape[:-1], index.k)
    expected = index.search(x.reshape(-1, 16), index.k)
    agree((D.reshape(-1, index.k), I.reshape(-1, index.k)), expected, rtol=1e-6, atol=1e-6)


def test_forward_follows_k():
    index, _, queries = shared(k=3)
    assert index(queries)[0].shape == (len(queries), 3)
    index.k = 5
    assert index(queries)[1].shape == (len(queries), 5)


# --- gradients ----------------------------------------------------------------------------------------------


def _gradient(x, vectors, metric):
    """The gradient in x (Q, d) of the sum of D over vectors (Q, K, d), in float64."""
    x, vectors = x.double(), vectors.double()
    if metric == "l2":
        return (2 * (x[:, None] - vectors)).sum(1)
    if metric == "ip":
        return vectors.sum(1)
    norm = x.norm(dim=1, keepdim=True)
    along = x / norm
    return ((vectors - (vectors @ along[:, :, None]) * along[:, None]) / norm[:, None]).sum(1)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@each_metric
@pytest.mark.parametrize("staged", [False, True])
def test_gradient_of_distances(staged, mode, dtype, metric):
    index, base, queries = shared(PLAIN, metric, dtype, search_mode=mode)
    if staged:
        index.add(base[:40] * 1.1)
    plain = index.search(queries, 6)
    x = queries.clone().requires_grad_()
    D, I = index.search(x, 6)
    assert D.requires_grad
    assert not I.requires_grad
    agree((D.detach(), I), plain, rtol=1e-5, atol=1e-5)
    D.sum().backward()
    ids, vectors, _ = held(index)
    rows = torch.stack([(ids == i).nonzero()[0, 0] for i in I.flatten()]).view(I.shape)
    expected = _gradient(x.detach(), vectors[rows], metric)
    torch.testing.assert_close(x.grad.double(), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", [torch.float64, torch.float16])
def test_gradient_comes_back_in_the_type_of_the_queries(kind):
    index, _, queries = shared()
    x = queries.to(kind).requires_grad_()
    index.search(x, 3)[0].sum().backward()
    assert x.grad.dtype == kind
    assert x.grad.isfinite().all()
    assert x.grad.abs().sum() > 0


@pytest.mark.parametrize(
    "name",
    [
        "plain",
        "k above everything",
        "nothing added",
        "bad queries",
        "zero vectors",
        "duplicates",
        "no queries",
        "empty lists",
    ],
)
@pytest.mark.parametrize("mode", MODES)
@each_metric
def test_padding_and_coincidence_give_no_bad_gradient(name, mode, metric):
    case = problem(name)
    index, _, queries = shared(case, metric, search_mode=mode)
    x = queries.clone().requires_grad_()
    D, _ = index.search(x, case.k)
    D.masked_fill(D.isinf(), 0).sum().backward()
    good = queries.isfinite().all(1)
    assert x.grad[good].isfinite().all()


def test_no_graph_where_none_is_wanted():
    index, _, queries = shared()
    assert not index.search(queries, 3)[0].requires_grad
    x = queries.clone().requires_grad_()
    with torch.no_grad():
        assert not index.search(x, 3)[0].requires_grad
    with torch.inference_mode():
        agree(index.search(queries, 3), index.search(queries, 3), rtol=1e-6)
    agree(index.search(queries, 3), index.search(queries.clone(), 3), rtol=1e-6)


def test_built_in_inference_mode_and_used_outside():
    """Buffers made under inference_mode must still serve searches with gradients, and further adds."""
    with torch.inference_mode():
        index, base, queries = ivf()
        index.search(queries, 3)
    x = queries.clone().requires_grad_()
    index.search(x, 3)[0].sum().backward()
    assert x.grad.isfinite().all()
    index.add(base.clone())
    assert index.ntotal == 2 * PLAIN.nb


@each_metric
def test_gradient_reaches_an_encoder(metric):
    torch.manual_seed(0)
    encoder = nn.Linear(8, 16)
    index, _, _ = shared(PLAIN, metric)
    model = nn.Sequential(encoder, index)
    x = normal(12, 8)
    D, I = model(x)
    D.mean().backward()
    ids, vectors, _ = held(index)
    rows = torch.stack([(ids == i).nonzero()[0, 0] for i in I.flatten()]).view(I.shape)
    outer = _gradient(encoder(x).detach(), vectors[rows], metric) / D.numel()
    torch.testing.assert_close(encoder.weight.grad.double(), outer.T @ x.double(), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(encoder.bias.grad.double(), outer.sum(0), rtol=1e-4, atol=1e-5)


@each_metric
def test_gradcheck_of_exact_scores(metric):
    x = comparable(normal(3, 4), metric).requires_grad_()
    vectors = comparable(normal(15, 4, seed=1), metric).view(3, 5, 4).requires_grad_()
    assert torch.autograd.gradcheck(lambda a, b: exact_scores(a, b, metric), (x, vectors))
    scores = exact_scores(x, vectors, metric)
    difference = x[:, None] - vectors
    expected = -difference.square().sum(2) if metric == "l2" else (x[:, None] * vectors).sum(2)
    torch.testing.assert_close(scores, expected)


def test_gradients_from_several_threads():
    index, _, queries = shared()
    grads = {}

    def work(name):
        x = queries.clone().requires_grad_()
        index.search(x, 3)[0].sum().backward()
        grads[name] = x.grad

    threads = [threading.Thread(target=work, args=(name,)) for name in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(grads) == 3
    torch.testing.assert_close(grads[1], grads[0])
    torch.testing.assert_close(grads[2], grads[0])
