"""An index in the checkpoints of a training run: distributed checkpoints, averages of weights, other processes."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.multiprocessing as mp
from torch import nn
from torch.distributed import checkpoint as dcp
from torch.optim import swa_utils

from tests.datasets import normal
from tests.oracle import agree
from tests.problems import few_training_rows
from tests.states import same_state, snapshot
from torch_ivf_module import AveragedModel, IndexFlatIP, IndexFlatL2, IndexIVFFlat
from torch_ivf_module.dcp import IndexLoadPlanner

D = 8
pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")


class Retriever(nn.Module):
    """An encoder and two indexes in a ModuleDict."""

    def __init__(self, nlist: int = 4) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(D, D), nn.LayerNorm(D))
        self.memory = nn.ModuleDict({"goods": IndexIVFFlat(D, nlist=nlist, nprobe=2), "users": IndexFlatIP(D)})

    def forward(self, x):
        return self.memory["goods"](self.encoder(x))


def filled(rows: int = 200, nlist: int = 4) -> Retriever:
    model = Retriever(nlist).eval()
    x = normal(rows, D)
    with few_training_rows():
        model.memory["goods"].train(x).add(x)
    model.memory["users"].add_with_ids(x[:50], torch.arange(50) * 7)
    return model


# --- torch.distributed.checkpoint ---------------------------------------------------------------------------


def test_a_model_through_distributed_checkpoint(tmp_path):
    model, fresh = filled(), Retriever()
    dcp.save({"model": model.state_dict(), "step": 3}, checkpoint_id=tmp_path / "step3", no_dist=True)
    state = {"model": fresh.state_dict(), "step": 0}
    dcp.load(state, checkpoint_id=tmp_path / "step3", planner=IndexLoadPlanner(), no_dist=True)
    fresh.load_state_dict(state["model"])
    assert state["step"] == 3
    assert same_state(snapshot(fresh), snapshot(model))
    queries = normal(9, D, seed=2)
    agree(fresh.eval()(queries), model(queries), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("before", [0, 77, 200])
def test_an_index_of_any_size_takes_the_size_that_was_saved(before, tmp_path):
    model, target = filled(200, nlist=6), filled(before) if before else Retriever()
    dcp.save({"model": model}, checkpoint_id=tmp_path / "saved", no_dist=True)
    dcp.load({"model": target}, checkpoint_id=tmp_path / "saved", planner=IndexLoadPlanner(), no_dist=True)
    assert same_state(snapshot(target), snapshot(model))
    target.memory["goods"].add(normal(5, D, seed=6))
    target.memory["goods"].nprobe = 6
    assert target.memory["goods"].search(normal(5, D, seed=6), 1)[1].flatten().tolist() == list(range(200, 205))


def test_indexes_in_lists_and_other_objects(tmp_path):
    model, other = filled(), nn.Module()
    other.register_buffer("centroids", torch.ones(3))
    state = {"models": [model.state_dict()], "other": other.state_dict()}
    dcp.save(state, checkpoint_id=tmp_path / "saved", no_dist=True)
    fresh = Retriever()
    target = {"models": [fresh.state_dict()], "other": {"centroids": torch.zeros(3)}}
    dcp.load(target, checkpoint_id=tmp_path / "saved", planner=IndexLoadPlanner(), no_dist=True)
    fresh.load_state_dict(target["models"][0])
    assert same_state(snapshot(fresh), snapshot(model))
    assert target["other"]["centroids"].sum() == 3


def test_an_index_alone_and_part_of_a_checkpoint(tmp_path):
    model = filled()
    dcp.save({"model": model}, checkpoint_id=tmp_path / "saved", no_dist=True)
    index = IndexIVFFlat(D, nlist=4)
    state = {f"model.memory.goods.{name}": tensor for name, tensor in index.state_dict().items()}
    dcp.load(state, checkpoint_id=tmp_path / "saved", planner=IndexLoadPlanner(), no_dist=True)
    index.load_state_dict({name.rpartition(".")[2]: tensor for name, tensor in state.items()})
    assert same_state(snapshot(index), snapshot(model.memory["goods"]))


# --- averages of weights ------------------------------------------------------------------------------------


@pytest.mark.parametrize("use_buffers", [False, True])
@pytest.mark.parametrize("average", [None, swa_utils.get_ema_multi_avg_fn(0.5), swa_utils.get_swa_multi_avg_fn()])
def test_an_average_follows_the_index_and_averages_the_rest(average, use_buffers):
    model = filled()
    mean = AveragedModel(model, multi_avg_fn=average, use_buffers=use_buffers)
    mean.update_parameters(model)
    start = model.encoder[0].weight.detach().clone()
    with torch.no_grad():
        model.encoder[0].weight += 1
    model.memory["goods"].add(normal(31, D, seed=4))
    model.memory["users"].remove_ids(torch.tensor([7]))
    mean.update_parameters(model)
    assert same_state(snapshot(mean.module.memory), snapshot(model.memory))
    torch.testing.assert_close(mean.module.encoder[0].weight, start + 0.5)
    found = mean(normal(5, D, seed=9))
    assert found[1].shape == (5, 10)
    model.memory["goods"].reset()
    assert mean.module.memory["goods"].ntotal == 231, "the two share no tensors"


def test_an_average_of_different_sizes_is_refused():
    model = filled()
    mean = AveragedModel(model)
    model.memory["more"] = IndexFlatL2(D)
    with pytest.raises(ValueError, match="more"):
        mean.update_parameters(model)
    assert isinstance(model.memory["goods"], IndexIVFFlat), "the model is unchanged"
    with pytest.raises(TypeError, match="contains an index"):
        AveragedModel(IndexFlatL2(D))


def test_an_average_of_an_index_in_two_places_and_its_size(tmp_path):
    model = filled()
    model.memory["again"] = model.memory["goods"]
    mean = AveragedModel(model, use_buffers=True)
    mean.update_parameters(model)
    torch.save(mean, tmp_path / "before.pt")
    model.memory["goods"].add(normal(31, D, seed=4))
    mean.update_parameters(model)
    assert same_state(snapshot(mean.module), snapshot(model))
    torch.save(mean, tmp_path / "after.pt")
    assert (tmp_path / "after.pt").stat().st_size < (tmp_path / "before.pt").stat().st_size + 31 * (4 * D + 8) + 2048


# --- other processes ----------------------------------------------------------------------------------------


def _search_elsewhere(model, queries, answers):
    index = model.memory["goods"]
    shared = all(buffer.is_shared() for buffer in index.buffers())
    D, I = index.search(queries, 5)
    answers.put((shared, D.numpy().tolist(), I.numpy().tolist()))


def test_another_process_searches_the_same_memory():
    model = filled()
    model.share_memory()
    context = mp.get_context("spawn")
    queries, answers = normal(6, D, seed=3), context.Queue()
    process = context.Process(target=_search_elsewhere, args=(model, queries, answers))
    process.start()
    shared, D_there, I_there = answers.get(timeout=120)
    process.join(60)
    assert process.exitcode == 0
    assert shared
    agree((torch.tensor(D_there), torch.tensor(I_there)), model.memory["goods"].search(queries, 5), rtol=1e-6, atol=0)


# --- casts, keys, copies ------------------------------------------------------------------------------------


def test_halving_the_parent_keeps_centroids_and_answers():
    model = filled()
    queries = normal(9, D, seed=2)
    before = model.memory["goods"].search(queries, 5)
    model.half()
    index = model.memory["goods"]
    assert (index.packed_embeddings.dtype, index.centroids.dtype) == (torch.float16, torch.float32)
    assert index.list_ids.dtype == index.list_offsets.dtype == torch.int64
    agree(index.search(queries.half(), 5), before, rtol=2e-2, atol=2e-2)


def test_renamed_keys_load_under_their_new_names():
    model, fresh = filled(), Retriever()
    old = {key.replace("memory.goods", "retriever.index"): value for key, value in model.state_dict().items()}
    with pytest.raises(RuntimeError, match=r"memory\.goods\.centroids"):
        fresh.load_state_dict(old)
    assert fresh.memory["goods"].ntotal == 0
    renamed = {key.replace("retriever.index", "memory.goods"): value for key, value in old.items()}
    fresh.load_state_dict(renamed)
    assert same_state(snapshot(fresh), snapshot(model))


def test_a_hook_that_renames_keys_is_called():
    model = filled()
    fresh = Retriever()

    def rename(module, state, prefix, *rest):
        for key in [key for key in state if "old_goods" in key]:
            state[key.replace("old_goods", "goods")] = state.pop(key)

    fresh.register_load_state_dict_pre_hook(rename)
    fresh.load_state_dict({key.replace("goods", "old_goods"): value for key, value in model.state_dict().items()})
    assert same_state(snapshot(fresh), snapshot(model))


def test_a_hook_on_the_index_itself_is_called():
    index, fresh = filled().memory["goods"], IndexIVFFlat(D, nlist=4)

    def rename(module, state, prefix, *rest):
        state[prefix + "packed_embeddings"] = state.pop(prefix + "vectors")

    state = index.state_dict()
    state["vectors"] = state.pop("packed_embeddings")
    fresh.register_load_state_dict_pre_hook(rename)
    fresh.load_state_dict(state)
    assert same_state(snapshot(fresh), snapshot(index))


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, 1e6])
def test_vectors_beyond_the_storage_dtype_are_refused(bad):
    """Such vectors are checked when a state is loaded or the dtype changes, since all of them are read then."""
    state = filled().memory["goods"].state_dict()
    state["packed_embeddings"] = state["packed_embeddings"].clone()
    state["packed_embeddings"][17, 2] = bad
    target = IndexIVFFlat(D, nlist=4, dtype=torch.float16)
    with pytest.raises(RuntimeError, match="row 17"):
        target.load_state_dict(state)
    assert target.ntotal == 0
    index = filled().memory["goods"]
    index.update(torch.tensor([5]), torch.full((1, D), 1e6))
    before = snapshot(index)
    with pytest.raises(ValueError, match=r"values beyond 6\.55e"):
        index.half()
    assert same_state(snapshot(index), before)
    assert index.dtype == torch.float32


def test_a_state_of_a_later_release_is_refused():
    model, fresh = filled(), Retriever()
    state = copy.copy(model.state_dict())
    state._metadata["memory.goods"]["version"] = 1000
    with pytest.raises(RuntimeError, match="version 1000, this release reads up to 1"):
        fresh.load_state_dict(state)
    assert fresh.memory["goods"].ntotal == 0
