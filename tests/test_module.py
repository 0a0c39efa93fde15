"""The index as a module: buffers, moving and copying, train and eval, forward."""

from __future__ import annotations

import io
import pickle
from copy import deepcopy

import pytest
import torch
from torch import nn

from tests.datasets import PLAIN, normal
from tests.kinds import BUFFERS, STORED, Deep, buffers_of, each_stored, fresh, same_answers
from tests.oracle import agree, check, probed, stored_rows
from tests.problems import DTYPES, each_metric, shared
from tests.states import same_state, settings_of, snapshot, unchanged
from torch_ivf_module import IndexFlatIP, IndexFlatL2, IndexIVFFlat, IndexScalarQuantizer

# --- buffers --------------------------------------------------------------------------------------------------


@each_stored
def test_state_dict_has_exactly_the_documented_buffers(kind):
    index, _, queries = STORED[kind]()
    index.search(queries, 3)
    index.range_search(queries, 1.0)
    names = buffers_of(index)
    assert list(index.state_dict()) == names
    assert set(dict(index.named_buffers())) >= set(names)
    assert not list(index.parameters())
    state = index.state_dict()
    lists = len(state["list_offsets"]) - 1
    assert state["centroids"].dtype == torch.float32
    assert state["centroids"].shape[1] == index.d
    width = {"packed_embeddings": index.d, "packed_codes": index.d * index.config().get("bits", 0) // 8 + 8}[names[1]]
    assert state[names[1]].shape == (index.ntotal, width)
    assert state["list_offsets"].dtype == state["list_ids"].dtype == state["next_id"].dtype == torch.int64
    assert state["list_ids"].shape == (index.ntotal,)
    assert state["next_id"].shape == ()
    assert int(state["next_id"]) == index.ntotal
    assert state["list_offsets"][-1] == index.ntotal
    if not index.store.flat:
        assert lists == index.nlist == len(state["centroids"])
    for name, value in state.items():
        assert torch.equal(getattr(index, name), value)


@pytest.mark.parametrize(
    "make",
    [
        lambda: IndexIVFFlat(8, nlist=4),
        lambda: IndexFlatL2(8),
        lambda: IndexFlatIP(8),
        lambda: IndexScalarQuantizer(8),
    ],
)
def test_buffers_of_a_new_index_are_empty_tensors(make):
    index = make()
    state = index.state_dict()
    assert list(state) == buffers_of(index)
    for name in ("centroids", buffers_of(index)[1], "list_ids"):
        assert state[name].numel() == 0
    assert int(state["next_id"]) == 0
    assert index.ntotal == 0
    assert index.is_trained == index.store.flat


def test_a_parent_that_reads_the_buffers_sees_pending_rows():
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


def test_is_trained_depends_on_the_buffers_alone():
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


def test_extra_repr():
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


# --- moving and copying ---------------------------------------------------------------------------------------


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
        check(moved.search(queries, 10), queries, stored_rows(moved), metric, 10, probed(moved, queries))
        moved.add(normal(5, index.d))
        assert moved.packed_embeddings.dtype == end
        assert moved.ntotal == index.ntotal + 5


def test_double_is_not_a_storage_type():
    """double() keeps the dtype or raises, and searching works."""
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


@each_stored
@pytest.mark.parametrize("copy", [deepcopy, _pickled, _torch_saved], ids=["deepcopy", "pickle", "torch.save"])
@pytest.mark.parametrize("pending", [False, True])
def test_copies_are_equal_and_independent(kind, copy, pending):
    index, base, queries = STORED[kind]()
    index.k, index.max_bytes = 4, 1 << 20
    if pending:
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


@each_stored
def test_an_untrained_index_can_be_copied(kind):
    index = fresh(STORED[kind]()[0])
    for copy in (deepcopy, _pickled, _torch_saved):
        assert same_state(snapshot(copy(index)), snapshot(index))


def test_share_memory():
    index, _, queries = shared()
    expected = index.search(queries, 10)
    assert index.share_memory() is index
    assert all(buffer.is_shared() for name, buffer in index.named_buffers() if name in BUFFERS)
    agree(index.search(queries, 10), expected, rtol=1e-6)


# --- train and eval, and forward ------------------------------------------------------------------------------


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
    assert not index.training, "training on vectors does not change the mode"
    twin = IndexIVFFlat(16, nlist=4)
    twin.fit(normal(300, 16))
    assert torch.equal(twin.centroids, index.centroids)
    assert twin.training


@pytest.mark.parametrize("kind", [IndexFlatL2, IndexFlatIP])
def test_training_calls_on_flat_indexes(kind):
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


@each_stored
@pytest.mark.parametrize("shape", [(16,), (1, 16), (7, 16), (2, 3, 16), (2, 0, 16), (2, 1, 2, 16)], ids=str)
def test_forward_takes_any_leading_shape(kind, shape):
    index, _, _ = STORED[kind]()
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
