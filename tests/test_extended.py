"""Indexes with additional buffers, parameters, child modules and extra state, of a subclass or on an instance."""

from __future__ import annotations

import io
import pickle
from copy import deepcopy

import pytest
import torch
from torch import nn
from torch.distributed import checkpoint as dcp

from tests.datasets import normal
from tests.kinds import BUFFERS
from tests.oracle import agree
from tests.problems import few_training_rows
from torch_ivf_module import IndexFlatL2, IndexIVFFlat, IndexPreTransform
from torch_ivf_module.dcp import IndexLoadPlanner

D = 8
pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")


class Additions:
    """A mixin of what subclasses may add to an index."""

    def __init__(self, *args, **settings):
        super().__init__(*args, **settings)
        self.register_buffer("labels", torch.zeros(5, dtype=torch.int64))
        self.register_buffer("scratch", torch.zeros(2), persistent=False)
        self.register_buffer("nothing", None)
        self.scale = nn.Parameter(torch.ones(1))
        self.head = nn.Sequential(nn.Linear(D, 3), nn.BatchNorm1d(3))
        self.words = ["none"]

    def get_extra_state(self):
        return {"words": self.words}

    def set_extra_state(self, state):
        self.words, self.seen = state["words"], self.ntotal


class MyFlat(Additions, IndexFlatL2):
    pass


class MyInvertedFile(Additions, IndexIVFFlat):
    _version = 3


class Behind(Additions, IndexPreTransform):
    def __init__(self):
        super().__init__(D, nn.Linear(D, 4), IndexFlatL2(4))


def on_instance():
    index = IndexFlatL2(D)
    index.register_buffer("labels", torch.zeros(5, dtype=torch.int64))
    index.register_parameter("scale", nn.Parameter(torch.ones(1)))
    index.head = nn.Sequential(nn.Linear(D, 3), nn.BatchNorm1d(3))
    return index


MAKERS = {
    "flat": lambda: MyFlat(D),
    "ivf": lambda: MyInvertedFile(D, nlist=4),
    "instance": on_instance,
    "behind": Behind,
}
WRAPS = {
    "alone": (lambda index: index, lambda module: module),
    "nested": (lambda index: nn.Sequential(nn.ModuleDict({"x": index})), lambda module: module[0]["x"]),
}
each_maker = pytest.mark.parametrize("maker", MAKERS)
each_wrap = pytest.mark.parametrize("wrap", WRAPS)


def filled(maker):
    torch.manual_seed(1)
    index = MAKERS[maker]()
    x = normal(40, D)
    with few_training_rows():
        index.train(x)
    index.add(x)
    index.labels.copy_(torch.arange(5) + 7)
    with torch.no_grad():
        index.scale.fill_(3.0)
    index.head(normal(9, D)).sum().backward()  # updates the statistics of the batch norm
    index.words = ["some", "words"]
    return index


def same(one, other):
    ours, theirs = one.state_dict(), other.state_dict()
    assert list(ours) == list(theirs)
    for name in ours:
        assert ours[name] == theirs[name] if name.endswith("_extra_state") else torch.equal(ours[name], theirs[name])
    queries = normal(4, D, seed=3)
    agree(one.search(queries, 3), other.search(queries, 3), rtol=1e-6, atol=1e-6)
    assert one.ntotal == other.ntotal == 40


@each_maker
@each_wrap
@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("assign", [True, False])
def test_additions_load_with_the_index(maker, wrap, strict, assign):
    inside, outside = WRAPS[wrap]
    source, target = filled(maker), MAKERS[maker]()
    result = inside(target).load_state_dict(inside(source).state_dict(), strict=strict, assign=assign)
    assert (result.missing_keys, result.unexpected_keys) == ([], [])
    same(target, source)
    if maker == "behind":
        assert target.words == ["some", "words"]  # torch loads child modules, and so the vectors, after the extra state
    elif maker != "instance":
        assert (target.words, target.seen) == (["some", "words"], 40), "extra state is set after the vectors are loaded"
    target.scale.sum().backward()
    assert outside(inside(target)) is target


@each_maker
@each_wrap
def test_additions_load_through_distributed_checkpoint(maker, wrap, tmp_path):
    inside, _ = WRAPS[wrap]
    source, target = filled(maker), MAKERS[maker]()
    dcp.save({"model": inside(source)}, checkpoint_id=tmp_path / "saved", no_dist=True)
    dcp.load({"model": inside(target)}, checkpoint_id=tmp_path / "saved", planner=IndexLoadPlanner(), no_dist=True)
    same(target, source)


def test_a_checkpoint_of_the_same_sizes_is_read_in_place(tmp_path):
    source, target = filled("ivf"), filled("ivf")
    target.update(torch.arange(9), normal(9, D, seed=5))
    target.search(normal(1, D), 1)
    dcp.save({"model": source.state_dict()}, checkpoint_id=tmp_path / "saved", no_dist=True)
    state = {"model": target.state_dict()}
    dcp.load(state, checkpoint_id=tmp_path / "saved", no_dist=True)
    target.load_state_dict(state["model"])
    same(target, source)


def _torch_saved(index):
    file = io.BytesIO()
    torch.save(index, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@each_maker
@pytest.mark.parametrize(
    "copy", [deepcopy, lambda index: pickle.loads(pickle.dumps(index)), _torch_saved], ids=["copy", "pickle", "torch"]
)
def test_copies_keep_the_additions(maker, copy):
    index = filled(maker)
    same(copy(index), index)


def test_copy_subset_keeps_the_additions():
    index = filled("ivf")
    part = index.copy_subset(torch.arange(9))
    assert part.ntotal == 9
    assert torch.equal(part.labels, index.labels)
    assert part.words == index.words
    assert part.search(normal(2, D), 2)[1].max() < 9
    fresh = MAKERS["ivf"]()
    fresh.load_state_dict(part.state_dict())
    assert fresh.ntotal == 9


class Twin(Additions, nn.Module):
    """The same additions to a plain module, whose buffers have the names and order of an index's."""

    _version = 3
    ntotal = 40

    def __init__(self, like):
        for name in ("centroids", "list_offsets"):
            assert hasattr(like, name)
        super().__init__()
        own = {name: like.get_buffer(name).clone() for name in BUFFERS}
        rest, self._buffers = dict(self._buffers), {}
        for name, tensor in own.items():
            self.register_buffer(name, tensor)
        self._buffers.update(rest)


CHANGES = {
    "nothing": lambda state: None,
    "no labels": lambda state: state.pop("labels"),
    "no scale": lambda state: state.pop("scale"),
    "no part of a child": lambda state: state.pop("head.0.weight"),
    "no extra state": lambda state: state.pop("_extra_state"),
    "no vectors at all": lambda state: [state.pop(name) for name in BUFFERS[:4]],
    "a stray": lambda state: state.update(stray=torch.zeros(1)),
    "a stray below a child": lambda state: state.update({"head.stray": torch.zeros(1)}),
    "a stray below nothing": lambda state: state.update({"nowhere.stray": torch.zeros(1)}),
    "what is not saved": lambda state: state.update(scratch=torch.zeros(2), checksums=torch.zeros(3)),
    "labels of another size": lambda state: state.update(labels=torch.zeros(6, dtype=torch.int64)),
    "labels that are no tensor": lambda state: state.update(labels=[1, 2]),
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("strict", [True, False])
@each_wrap
def test_keys_are_reported_as_torch_reports_them(change, strict, wrap):
    inside, _ = WRAPS[wrap]
    source = filled("ivf")
    state = dict(source.state_dict())
    CHANGES[change](state)
    prefix = next(iter(inside(source).state_dict())).rpartition("scale")[0]
    state = {prefix + name: value for name, value in state.items()}
    reports = []
    for module in (MAKERS["ivf"](), Twin(source)):
        try:
            result = inside(module).load_state_dict(state, strict=strict)
            expected = [key for key in result.missing_keys if not key.endswith("next_id")]
            reports.append((sorted(expected), sorted(result.unexpected_keys)))
        except RuntimeError as error:
            lines = str(error).replace(f'"{prefix}next_id"', "").replace("Twin", "MyInvertedFile")
            reports.append(sorted(lines.replace(",", " ").split()))
    assert reports[0] == reports[1]


def test_load_hooks_see_and_change_the_whole_state():
    index, source, calls = MAKERS["flat"](), filled("flat"), []

    def before(module, state, prefix, metadata, strict, missing, unexpected, errors):
        assert module is index
        calls.append((prefix, strict, sorted(state) == sorted(source.state_dict()) or "old" in state))
        if "old" in state:
            state["labels"] = state.pop("old")

    index.register_load_state_dict_pre_hook(before)
    index.register_load_state_dict_post_hook(lambda module, keys: calls.append((module.ntotal, keys.missing_keys)))
    state = source.state_dict()
    state["old"] = state.pop("labels")
    index.load_state_dict(state)
    assert calls == [("", True, True), (40, [])], "each once"
    same(index, source)
    index.load_state_dict(source.state_dict())
    assert len(calls) == 4, "hooks and the saved keys do not change"
    assert list(index.state_dict()) == list(source.state_dict())


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("lost", BUFFERS[:4])
def test_a_state_without_one_buffer_is_refused(strict, lost):
    source, index = filled("flat"), filled("flat")
    index.remove_ids(torch.arange(7))
    state = source.state_dict()
    del state[lost]
    with pytest.raises(RuntimeError, match=rf"lacks {lost}, and an index loads all of its buffers or none"):
        index.load_state_dict(state, strict=strict)
    assert index.ntotal == 33


@pytest.mark.parametrize("entry", [None, 3, [1.0], "text"])
def test_an_entry_that_is_no_tensor_is_refused(entry):
    index = filled("flat")
    with pytest.raises(RuntimeError, match=f"list_ids must be a tensor, got {type(entry).__name__}"):
        index.load_state_dict({**index.state_dict(), "list_ids": entry})
    same(index, filled("flat"))


def test_states_and_indexes_on_the_meta_device():
    index = filled("flat")
    without = {name: tensor for name, tensor in index.state_dict().items() if name in BUFFERS}
    empty = {name: torch.empty_like(tensor, device="meta") for name, tensor in without.items()}
    with pytest.raises(RuntimeError, match="meta device and has no values"):
        index.load_state_dict(empty, strict=False)
    same(index, filled("flat"))
    shapes = IndexFlatL2(D, device="meta")
    shapes.load_state_dict(empty)
    assert shapes.ntotal == 40
    shapes.to_empty(device="cpu").load_state_dict(without)
    agree(shapes.search(normal(3, D), 2), index.search(normal(3, D), 2), rtol=1e-6, atol=1e-6)
    with pytest.warns(UserWarning, match="assign=True"):
        IndexFlatL2(D, device="meta").load_state_dict(without)


def test_buffers_excluded_from_the_state_dict():
    """By `_non_persistent_buffers_set`, as torch does it."""
    index = filled("flat")
    index._non_persistent_buffers_set.update(BUFFERS)
    state = index.state_dict()
    assert not set(BUFFERS) & set(state)
    other = filled("flat")
    other.labels.zero_()
    other._non_persistent_buffers_set.update(BUFFERS)
    assert other.load_state_dict(state).missing_keys == []
    same(other, index)


@each_maker
def test_an_index_made_on_the_meta_device(maker):
    with torch.device("meta"):
        index = MAKERS[maker]()
    index.to_empty(device="cpu")
    for module in index.modules():
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()
    inner = index.index if maker == "behind" else index
    assert (inner.ntotal, int(inner.next_id), inner.is_trained) == (0, 0, maker != "ivf")
    x = normal(40, D)
    with few_training_rows():
        index.train(x)
    index.add(x)
    assert index.search(x, 1)[1][:, 0].tolist() == list(range(40))


@each_maker
def test_resetting_parameters_keeps_settings_dtype_and_additions(maker):
    index = filled(maker)
    inner = index.index if maker == "behind" else index
    inner.half()
    inner.k = 3
    inner.reset_parameters()
    assert (inner.ntotal, int(inner.next_id), inner.k, inner.dtype) == (0, 0, 3, torch.float16)
    assert inner.is_trained == (maker != "ivf")
    assert index.labels.tolist() == [7, 8, 9, 10, 11]
