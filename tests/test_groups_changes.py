"""Groups of rows through changes: repeated ids, merged and saved indexes, weights that are averaged, and threads."""

from __future__ import annotations

import copy
import pickle
import threading

import pytest
import torch

from tests.test_groups import KINDS, D, N, built, filled, same_groups, vectors
from torch_ivf_module import AveragedModel, IndexFlat, IndexIVFFlat, MaxSim, SearchParams, load
from torch_ivf_module.dcp import IndexLoadPlanner


@pytest.mark.parametrize("kind", ["flat", "ivf"])
@pytest.mark.parametrize("packed", [False, True])
def test_the_last_of_repeated_ids_is_found_whatever_its_group(kind, packed):
    index, generator = built(kind), torch.Generator().manual_seed(7)
    x, ids = vectors(200, 4), torch.randint(30, (200,), generator=generator)
    groups = torch.randint(-3, 3, (200,), generator=generator)
    for part in torch.arange(200).split(40):
        index.add_with_ids(x[part], ids[part], groups=groups[part])
        if packed:
            index.list_sizes()
    last = {int(id): row for row, id in enumerate(ids)}
    wanted, rows = torch.tensor(list(last)), torch.tensor(list(last.values()))
    copies = [index, copy.deepcopy(index), pickle.loads(pickle.dumps(index)), index.copy_subset(wanted)]
    if kind == "ivf":
        copies.append(copy.deepcopy(index))
        copies[-1].retrain(vectors(N, 9))
    for each in copies:
        assert torch.equal(each.groups_of(wanted), groups[rows])
        assert torch.equal(each.reconstruct_batch(wanted), x[rows])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_files_keep_a_single_row(kind, suffix, tmp_path):
    index = built(kind)
    index.add(vectors(1, 0), groups=torch.tensor([4]))
    index.save(tmp_path / f"index{suffix}")
    assert load(tmp_path / f"index{suffix}").groups_of(torch.tensor([0])).tolist() == [4]


def test_a_merged_index_does_not_share_groups_with_the_other():
    index, other = filled(), filled()
    index.reset()
    state = other.state_dict()
    index.add(vectors(2 * N, 8))
    index.merge_from(other, 5000)
    state["list_groups"].fill_(9)
    assert same_groups(index, 5000)


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_distributed_checkpoints_of_as_many_rows_as_there_are(tmp_path):
    dcp = pytest.importorskip("torch.distributed.checkpoint")
    index, plain, other = filled(), filled(), filled()
    plain.reset()
    plain.add(vectors(index.ntotal, 3))
    dcp.save({"index": index}, checkpoint_id=tmp_path, no_dist=True)
    for target in (plain, other):
        dcp.load({"index": target}, checkpoint_id=tmp_path, planner=IndexLoadPlanner(), no_dist=True)
        assert same_groups(target)
        target.check_buffers()


@pytest.mark.parametrize("grouped", [False, True])
def test_averages_follow_groups_and_copy_what_has_changed_alone(grouped):
    model = torch.nn.Sequential(torch.nn.Linear(D, D), filled("flat") if grouped else IndexFlat(D))
    model[1].add(vectors(20, 0))
    average = AveragedModel(model)
    average.update_parameters(model)
    packed = average.module[1].store.packed
    average.update_parameters(model)
    assert average.module[1].store.packed is packed
    model[1].reset()
    model[1].add(vectors(20, 1), groups=torch.arange(20))
    average.update_parameters(model)
    assert torch.equal(average.module[1].groups_of(torch.arange(20)), torch.arange(20))
    model[1].reset()
    average.update_parameters(model)
    assert "list_groups" not in average.module[1].state_dict()


def test_groups_written_by_other_code_are_named():
    index = filled()
    index.list_groups += 1
    with pytest.raises(RuntimeError, match="next_id or list_groups were changed in place"):
        index.search(vectors(2, 1), 3)


def test_searches_see_rows_with_their_groups():
    index, errors, done = IndexIVFFlat(D, nlist=4), [], threading.Event()
    index.train(vectors(N, 0))
    index.nprobe = 4
    ids = torch.arange(300)
    index.add(vectors(300, 0), groups=torch.zeros(300, dtype=torch.int64))

    def search() -> None:
        x = vectors(6, 2)
        while not done.is_set():
            # All rows have one group, which each update raises by one: a search finds all of them, or none.
            for group in range(12):
                found = index.search(x, 300, params=SearchParams(groups=torch.full((6,), group)))[1]
                counts = (found >= 0).sum(1).unique().tolist()
                if counts not in ([0], [300]):
                    errors.append(counts)
            if (index.search(x, 300, params=SearchParams(group_by=7))[1] >= 0).sum(1).unique().tolist() != [7]:
                errors.append("group_by")

    threads = [threading.Thread(target=search) for _ in range(2)]
    for thread in threads:
        thread.start()
    try:
        for group in range(1, 12):
            index.update(ids, vectors(300, group), groups=torch.full((300,), group))
    finally:
        done.set()
        for thread in threads:
            thread.join()
    assert not errors
    assert (index.groups_of(ids) == 11).all()


def test_every_failing_change_keeps_groups():
    index, x = filled(), vectors(3, 1)
    broken = x.clone()
    broken[1, 1] = torch.nan
    groups = torch.tensor([1, 2, 3])
    with pytest.raises(ValueError, match="finite"):
        index.add(broken, groups=groups)
    with pytest.raises(ValueError, match="-1"):
        index.add_with_ids(x, torch.tensor([-1, 0, 1]), groups=groups)
    with pytest.raises(KeyError, match="25"):
        index.update(torch.tensor([25, 0, 1]), x, groups=groups)
    with pytest.raises(ValueError, match="distinct"):
        index.update(torch.tensor([0, 0, 1]), x, groups=groups)
    assert same_groups(index)
    plain = IndexFlat(D)
    with pytest.raises(ValueError, match="finite"):
        plain.add(broken, groups=groups)
    assert "list_groups" not in plain.state_dict()


def test_an_index_whose_grouped_rows_are_removed_has_no_groups():
    index = filled()
    index.remove_ids(torch.arange(850))
    index.list_sizes()
    assert index.ntotal == 50
    assert "list_groups" not in index.state_dict()
    assert (index.groups_of(torch.arange(850, 900)) == -1).all()
    index.update(torch.tensor([860]), vectors(1, 2), groups=torch.tensor([3]))
    assert index.groups_of(torch.tensor([860, 861])).tolist() == [3, -1]
    assert (index.copy_subset(torch.tensor([861, 862])).groups_of(torch.tensor([861])) == -1).all()


def test_group_by_reads_many_rows_of_one_group_within_the_memory_of_a_search():
    """Each query has to find the last row, behind all rows of one group."""
    index, x = IndexFlat(D, max_bytes=1 << 16), torch.zeros(5, D)
    index.add(vectors(2000, 0), groups=torch.zeros(2000, dtype=torch.int64))
    index.add(torch.full((1, D), 50.0), groups=torch.tensor([1]))
    i = index.search(x, 3, params=SearchParams(group_by=1))[1]
    assert (i[:, 0] == index.search(x, 1)[1][:, 0]).all()
    assert i[:, 1:].tolist() == [[2000, -1]] * 5
    assert index.search(x[:0], 3, params=SearchParams(group_by=1))[1].shape == (0, 3)


def test_maxsim_refuses_groups():
    index, queries = IndexFlat(D, "ip"), vectors(6, 1).view(2, 3, D)
    index.add_with_ids(vectors(40, 0), torch.arange(40) // 4, groups=torch.arange(40) // 4 % 2)
    for name, value in (("groups", torch.zeros(2, dtype=torch.int64)), ("group_by", 1)):
        with pytest.raises(ValueError, match=f"params has {name}, which MaxSim does not support"):
            MaxSim(index).search(queries, 3, params=SearchParams(**{name: value}))
