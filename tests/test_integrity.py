"""Overwritten ids and offsets are detected before they are used, and valid ones are not refused."""

from __future__ import annotations

import copy
import itertools
import pickle
from copy import deepcopy

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.optim import swa_utils

from tests.datasets import PLAIN, normal
from tests.oracle import agree
from tests.problems import flat, ivf
from tests.states import same_state, snapshot
from torch_ivf_module import AveragedModel, IndexFlatL2, IndexIVFFlat, to_faiss
from torch_ivf_module.index.building import empty_buffers
from torch_ivf_module.index.integrity import checksums

KINDS = {"ivf": ivf, "flat": flat}
each_kind = pytest.mark.parametrize("kind", KINDS)
refused = pytest.raises(
    RuntimeError, match=r"(?s)[Aa]verag.*AveragedModel.*use_buffers=False.*Distributed.*ignore_in_ddp.*load_state_dict"
)
READS = {
    "search": lambda index: index.search(normal(2, PLAIN.d), 3),
    "range_search": lambda index: index.range_search(normal(2, PLAIN.d), 1.0),
    "forward": lambda index: index(normal(2, PLAIN.d)),
    "add": lambda index: index.add(normal(2, PLAIN.d)),
    "add_with_ids": lambda index: index.add_with_ids(normal(1, PLAIN.d), torch.tensor([5])),
    "remove_ids": lambda index: index.remove_ids(torch.tensor([5])),
    "update": lambda index: index.update(torch.tensor([5]), normal(1, PLAIN.d)),
    "reconstruct": lambda index: index.reconstruct(5),
    "copy_subset": lambda index: index.copy_subset(torch.tensor([5])),
    "merge_from": lambda index: deepcopied_empty(index).merge_from(index),
    "graph": lambda index: index.graph(),
    "save": lambda index: index.save("never-written.pt"),
    "to_faiss": lambda index: to_faiss(index),
}


def deepcopied_empty(index):
    other = deepcopy(index)
    other.store.exchange(empty_buffers(other.store, keep_centroids=True))
    return other


def _plus_one(buffer):
    buffer += 1


WRITES = {
    "in place": _plus_one,
    "through .data": lambda buffer: buffer.data.add_(1),
    "through detach()": lambda buffer: buffer.detach().add_(1),
    "one entry": lambda buffer: buffer.view(-1)[:1].sub_(7),
    "zeros": lambda buffer: buffer.data.zero_(),
}


@each_kind
@pytest.mark.parametrize("name", ["list_offsets", "list_ids", "next_id"])
@pytest.mark.parametrize("write", WRITES)
def test_overwritten_ids_are_refused_until_a_state_is_loaded(kind, name, write):
    index, _, queries = KINDS[kind]()
    expected, state = index.search(queries, 5), snapshot(index)
    WRITES[write](dict(nn.Sequential(index).named_buffers())[f"0.{name}"])
    for _ in range(2):
        with refused:
            index.search(queries, 5)
    for copied in (deepcopy, lambda index: pickle.loads(pickle.dumps(index)), lambda index: deepcopy(index).half()):
        with refused:
            copied(index).search(queries, 5)
    index.load_state_dict(state)
    agree(index.search(queries, 5), expected, rtol=1e-6, atol=1e-6)


@each_kind
@pytest.mark.parametrize("read", READS)
def test_every_method_refuses_overwritten_ids(kind, read, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    if read == "to_faiss":
        pytest.importorskip("faiss")
    index, _, _ = KINDS[kind]()
    index.list_ids.data.sub_(1)
    with refused:
        READS[read](index)
    assert not list(tmp_path.iterdir())


def test_pending_rows_are_not_packed_into_overwritten_lists():
    index, base, _ = ivf()
    offsets = index.list_offsets
    index.add(base[:3])
    offsets[1] += 1
    with refused:
        index.state_dict()
    index.reset_parameters()
    assert (index.ntotal, index.is_trained) == (0, False)


@each_kind
def test_a_whole_state_that_is_copied_in_place_is_used(kind):
    """As DistributedDataParallel does from rank 0, and torch's AveragedModel with use_buffers=False."""
    index, base, queries = KINDS[kind]()
    other = deepcopy(index)
    other.update(torch.arange(9), normal(9, PLAIN.d, seed=3))
    other.search(queries, 5)
    for data in (False, True):
        for mine, theirs in zip(index.buffers(), other.buffers(), strict=True):
            (mine.data if data else mine).copy_(theirs)
        agree(index.search(queries, 5), other.search(queries, 5), rtol=1e-6, atol=1e-6)
        assert torch.equal(index.reconstruct(3), other.reconstruct(3))
        assert index.remove_ids(torch.arange(9)) == 9
        index.add_with_ids(base[:9], torch.arange(9))
        index.packed_embeddings  # noqa: B018 - packs, for the sizes to be equal


@each_kind
def test_overwriting_with_equal_values_is_allowed(kind):
    index, _, queries = KINDS[kind]()
    expected = index.search(queries, 5)
    for buffer in index.buffers():
        buffer.copy_(buffer.clone())
    agree(index.search(queries, 5), expected, rtol=1e-6, atol=1e-6)
    graph = index.graph()
    index.list_ids.copy_(index.list_ids.clone())
    index.search(queries, 5)
    graph.check_current()


@each_kind
def test_a_buffer_of_another_dtype_is_refused_or_not_set(kind):
    index, _, queries = KINDS[kind]()
    expected = index.search(queries, 5)
    index.type(torch.float16).type(torch.float32)
    assert index.list_ids.dtype == index.list_offsets.dtype == index.next_id.dtype == torch.int64
    agree(index.search(queries, 5), expected, rtol=1e-2, atol=5e-2)
    for name in ("list_ids", "list_offsets", "next_id"):
        damaged = deepcopy(index)
        damaged._buffers[name] = damaged._buffers[name].float()
        with pytest.raises(RuntimeError, match=rf"{name} must be.*int64.*AveragedModel"):
            damaged.search(queries, 5)


@each_kind
def test_assigned_buffers_are_checked_like_a_loaded_state(kind):
    index, _, queries = KINDS[kind]()
    D, I = index.search(queries, 5)
    index.list_ids = index.list_ids + 1000
    agree(index.search(queries, 5), (D, I + 1000), rtol=1e-6, atol=1e-6)
    swapped = {"list_ids": index.list_ids + 1000}
    assert torch.equal(torch.func.functional_call(index, swapped, (queries,))[1], index(queries)[1] + 1000)
    agree(index.search(queries, 5), (D, I + 1000), rtol=1e-6, atol=1e-6)
    index.list_offsets = index.list_offsets + 1
    with pytest.raises(RuntimeError, match="list_offsets must run"):
        index.search(queries, 5)


COPIES = {
    "deepcopy": deepcopy,
    "copy": copy.copy,
    "pickle": lambda index: pickle.loads(pickle.dumps(index)),
    "deepcopy of a model": lambda index: deepcopy(nn.Sequential(index))[0],
    "copy_subset": lambda index: index.copy_subset(index.list_ids),
    "to": lambda index: deepcopy(index).to(torch.float64),
}


@each_kind
@pytest.mark.parametrize("copied", COPIES)
def test_buffers_assigned_to_a_copy(kind, copied):
    index, _, queries = KINDS[kind]()
    D, I = index(queries)
    other = COPIES[copied](index)
    with torch.no_grad():
        swapped = torch.func.functional_call(other, {"list_ids": index.list_ids + 7}, (queries,))
    agree(swapped, (D, I + 7), rtol=1e-6, atol=1e-6)
    agree(other(queries), (D, I), rtol=1e-6, atol=1e-6)
    other = COPIES[copied](index)  # whose buffers have not been read yet
    other.list_ids = other.list_ids + 100
    agree(other(queries), (D, I + 100), rtol=1e-6, atol=1e-6)
    other.list_offsets = other.list_offsets + 1
    with pytest.raises(RuntimeError, match="list_offsets must run"):
        other.search(queries, 5)


@each_kind
@pytest.mark.parametrize("assign", [True, False])
def test_buffers_assigned_one_by_one_to_a_meta_index(kind, assign):
    """As generic loaders of modules do: the buffer that is not saved stays on the meta device."""
    index, base, queries = KINDS[kind]()
    with torch.device("meta"):
        other = IndexFlatL2(PLAIN.d)
        if kind == "ivf":
            other = IndexIVFFlat(PLAIN.d, nlist=index.nlist, nprobe=index.nprobe)
    for name, tensor in index.state_dict().items():
        if assign:
            setattr(other, name, tensor.clone())
        else:
            other._buffers[name] = tensor.clone()
    agree(other.search(queries, 5), index.search(queries, 5), rtol=1e-6, atol=1e-6)
    other.add(base[:3])
    assert not any(buffer.is_meta for buffer in other.buffers())
    agree(deepcopy(other).search(queries, 5), other.search(queries, 5), rtol=1e-6, atol=1e-6)
    other.list_ids.data.sub_(1)
    with refused:
        other.search(queries, 5)


def test_buffers_that_do_not_fit_a_meta_index_are_refused():
    index, _, queries = flat()
    with torch.device("meta"):
        other = IndexFlatL2(PLAIN.d)
    for name, tensor in index.state_dict().items():
        setattr(other, name, tensor.clone() + (name == "list_offsets"))
    with pytest.raises(RuntimeError, match="list_offsets must run"):
        other.search(queries, 5)


@each_kind
@pytest.mark.parametrize("mode", ["meta", "fake"])
def test_an_index_without_values_raises(kind, mode, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    index, _, queries = KINDS[kind]()
    shapes = {name: torch.empty_like(tensor, device="meta") for name, tensor in index.state_dict().items()}
    index.to("meta").load_state_dict(shapes, assign=True)
    with FakeTensorMode() if mode == "fake" else torch.device("meta"):
        if mode == "fake":
            index = IndexFlatL2(PLAIN.d)
            index.centroids, index.packed_embeddings = index.centroids.clone(), index.packed_embeddings.clone()
        x, ids = torch.zeros(2, PLAIN.d), torch.zeros(2, dtype=torch.int64)
        reads = {
            "search": lambda: index.search(x, 3),
            "with vectors": lambda: index.search_and_reconstruct(x, 3),
            "forward": lambda: index(x),
            "range_search": lambda: index.range_search(x, 1.0),
            "add": lambda: index.add(x),
            "add_with_ids": lambda: index.add_with_ids(x, ids),
            "remove_ids": lambda: index.remove_ids(ids),
            "update": lambda: index.update(ids, x),
            "reconstruct": lambda: index.reconstruct(5),
            "copy_subset": lambda: index.copy_subset(ids),
            "graph": lambda: index.graph(),
            "list_stats": lambda: index.list_stats(),
            "save": lambda: index.save("never-written.pt"),
        }
        for name, read in reads.items():
            for _ in range(2):
                with pytest.raises(RuntimeError, match=r"the index has no values, .*assign=True.*reset_parameters"):
                    pytest.fail(f"{name} gave {read()}")
        assert index.memory_bytes() > 0
    index.to_empty(device="cpu").load_state_dict(KINDS["flat" if mode == "fake" else kind]()[0].state_dict())
    assert index.search(queries, 3)[1].min() >= 0


def test_a_graph_without_values_raises():
    index, _, _ = flat()
    with pytest.raises(RuntimeError, match="the graph has no values"):
        index.graph().to("meta")(torch.zeros(2, PLAIN.d, device="meta"))


@each_kind
@pytest.mark.parametrize("use_buffers", [True, False])
@pytest.mark.parametrize("average", [swa_utils.get_ema_multi_avg_fn(0.9), None])
def test_averages_by_torch_are_correct_or_refused(kind, use_buffers, average):
    index, base, _ = KINDS[kind]()
    model = nn.Sequential(nn.Linear(PLAIN.d, PLAIN.d), index)
    settings = {} if average is None else {"multi_avg_fn": average}
    mean = swa_utils.AveragedModel(model, use_buffers=use_buffers, **settings)
    for _ in range(5):
        mean.update_parameters(model)
    try:
        found = mean.module[1].search(base, 1)[1][:, 0]
    except RuntimeError as error:
        assert use_buffers
        assert "AveragedModel" in str(error)  # noqa: PT017
    else:
        assert torch.equal(found, index.search(base, 1)[1][:, 0])
    index.update(torch.arange(40), normal(40, PLAIN.d, seed=6))
    mean.update_parameters(model)
    if use_buffers:
        with refused:
            mean.module[1].search(base, 1)
    else:
        agree(mean.module[1].search(base, 3), index.search(base, 3), rtol=1e-6, atol=1e-6)
    assert torch.equal(index.search(base[40:], 1)[1][:, 0], torch.arange(40, len(base)))


class Callback:
    """Like lightning.pytorch.callbacks.WeightAveraging, which swaps all tensors of two models through `.data`."""

    def __init__(self, model, use_buffers):
        average = swa_utils.get_ema_avg_fn(0.9)
        self.model, self.mean = model, swa_utils.AveragedModel(model, avg_fn=average, use_buffers=use_buffers)

    def step(self):
        self.mean.update_parameters(self.model)

    def swap(self):
        mine = itertools.chain(self.model.parameters(), self.model.buffers())
        theirs = itertools.chain(self.mean.module.parameters(), self.mean.module.buffers())
        for current, average in zip(mine, theirs, strict=True):
            kept = average.data.clone()
            average.data.copy_(current.data)
            current.data.copy_(kept)


@each_kind
def test_swapping_models_through_data(kind):
    index, base, _ = KINDS[kind]()
    model = nn.Sequential(nn.Linear(PLAIN.d, PLAIN.d), index)
    expected = index.search(base, 1)
    good, bad = Callback(model, use_buffers=False), Callback(model, use_buffers=True)
    for callback in (good, bad):
        for _ in range(5):
            callback.step()
    good.swap()
    agree(index.search(base, 1), expected, rtol=1e-6, atol=1e-6)
    good.swap()
    bad.swap()
    with refused:
        index.search(base, 1)
    bad.swap()
    agree(index.search(base, 1), expected, rtol=1e-6, atol=1e-6)


def test_an_average_follows_the_index_and_averages_what_a_subclass_added():
    index, base, _ = ivf()
    index.head = nn.Linear(2, 2, bias=False)
    index.register_buffer("scale", torch.zeros(2))
    index.register_buffer("steps", torch.tensor(0))
    model = nn.Sequential(nn.Linear(PLAIN.d, PLAIN.d), index)
    mean = AveragedModel(model, multi_avg_fn=swa_utils.get_ema_multi_avg_fn(0.5), use_buffers=True)
    mean.update_parameters(model)
    start = index.head.weight.detach().clone()
    with torch.no_grad():
        index.head.weight += 1
        index.scale += 1
    index.add(base[:5])
    mean.update_parameters(model)
    assert list(dict(mean.module.named_buffers())) == list(dict(model.named_buffers()))
    assert mean.module[1].ntotal == index.ntotal
    torch.testing.assert_close(mean.module[1].head.weight, start + 0.5)
    torch.testing.assert_close(mean.module[1].scale, torch.full((2,), 0.5))
    own = AveragedModel(index)
    own.update_parameters(index)
    assert same_state(snapshot(own.module), snapshot(index))


def test_an_average_does_not_change_graphs():
    index, base, _ = ivf()
    model = nn.ModuleList([nn.Linear(2, 2), index, index.graph(k=1)])
    mean = AveragedModel(model, multi_avg_fn=swa_utils.get_ema_multi_avg_fn(0.9), use_buffers=True)
    for _ in range(4):
        mean.update_parameters(model)
    assert torch.equal(model[2](base)[1], index.search(base, 1)[1])
    assert torch.equal(mean.module[1].search(base, 1)[1], index.search(base, 1)[1])
    with pytest.raises(RuntimeError, match="the index has changed since this graph"):
        mean.module[2](base)


def test_uninitialized_memory_is_not_searched():
    """After to_empty() the memory has arbitrary values, which may look like a valid index."""
    with torch.device("meta"):
        index = IndexFlatL2(4)
    for value in (0, 7 << 40):
        made = deepcopy(index).to_empty(device="cpu")
        for buffer in made.buffers():
            buffer.data.fill_(value)
        for read in (lambda made=made: made.search(torch.zeros(1, 4), 1), lambda made=made: made.add(torch.eye(4))):
            with pytest.raises(RuntimeError, match=r"to_empty\(\) call reset_parameters\(\)"):
                read()
        made.reset_parameters()
        made.add(torch.eye(4))
        assert made.search(torch.eye(4), 1)[1].flatten().tolist() == [0, 1, 2, 3]


def test_a_checksum_depends_on_every_entry_and_its_position():
    ids = torch.arange(200_000) * 3 - 5
    state = {"list_offsets": torch.zeros(0, dtype=torch.int64), "list_ids": ids, "next_id": torch.tensor(9)}
    expected = checksums(state)
    for at in (0, 1, 65_535, 65_536, 199_998):
        changed = ids.clone()
        changed[at] += 1
        assert not torch.equal(checksums({**state, "list_ids": changed}), expected)
        moved = ids.roll(at + 1)
        assert not torch.equal(checksums({**state, "list_ids": moved}), expected)
    for other in (ids[:-1], torch.cat([ids, ids[:0], torch.zeros(1, dtype=torch.int64)]), ids.view(2, -1).T.flatten()):
        assert not torch.equal(checksums({**state, "list_ids": other}), expected)
    assert torch.equal(checksums({**state, "list_ids": ids.repeat_interleave(2)[::2]}), expected)
