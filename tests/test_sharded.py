"""ShardedIndex over real processes, with gloo on loopback. jobs.py has what the processes run."""

from __future__ import annotations

import shutil
import signal
import sys

import pytest
import torch
import torch.distributed.checkpoint as dcp

from tests import jobs, jobs_filters, processes, traffic
from tests.oracle import agree
from torch_ivf_module import ShardedIndex
from torch_ivf_module.dcp import IndexLoadPlanner
from torch_ivf_module.sharded import newest

each_size = pytest.mark.parametrize("size", [1, 2, 4])
each_shard = pytest.mark.parametrize("shard", jobs.SHARDS)


@each_shard
@each_size
def test_a_sharded_index_answers_as_one_index_of_all_vectors(size, shard):
    assert processes.run(jobs.matrix, size, shard) == [0] * size


@each_shard
@each_size
def test_edges(size, shard):
    assert processes.run(jobs.edges, size, shard) == [0] * size


@each_shard
def test_filters_of_each_query(shard):
    assert processes.run(jobs_filters.sharded, 3, shard) == [0] * 3


def test_a_process_group_of_some_processes(tmp_path):
    assert processes.run(jobs.in_a_group, 3, str(tmp_path)) == [0, 0, 0]


def test_an_error_on_one_process_raises_on_all():
    assert processes.run(jobs.refusals, 2) == [0, 0]


in_one_process = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")


@in_one_process
@pytest.mark.parametrize(("shard", "other"), [("rows", "lists"), ("lists", "rows")])
def test_a_checkpoint_of_shards_opens_as_one_index(tmp_path, shard, other):
    processes.run(jobs.saves, 2, str(tmp_path), shard)
    processes.run(jobs.loads, 4, str(tmp_path), other)
    plain = jobs.empty()
    dcp.load({"index": plain}, checkpoint_id=newest(tmp_path), planner=IndexLoadPlanner(), no_dist=True)
    kept = torch.arange(20, jobs.N)
    expected = jobs.single_of(plain, jobs.BASE[kept], kept)
    assert torch.equal(plain.list_offsets, expected.list_offsets)
    agree(plain.search(jobs.QUERIES, jobs.K), expected.search(jobs.QUERIES, jobs.K))


@in_one_process
def test_a_checkpoint_of_one_index_opens_as_shards(tmp_path):
    processes.run(jobs.saves, 1, str(tmp_path / "one"), "rows")
    plain = jobs.empty()
    dcp.load({"index": plain}, checkpoint_id=newest(tmp_path / "one"), planner=IndexLoadPlanner(), no_dist=True)
    dcp.save({"index": plain}, checkpoint_id=tmp_path / "plain", no_dist=True)
    shutil.copy(tmp_path / "one" / "expected.pt", tmp_path / "plain")
    processes.run(jobs.loads, 2, str(tmp_path / "plain"), "lists")


def test_ddp_and_fsdp_do_not_change_shards(tmp_path):
    processes.run(jobs.in_models, 2, str(tmp_path))


@pytest.mark.parametrize(
    ("step", "after"), [("train", 0), ("train", 5), ("add", 0), ("add", 2), ("search", 3), ("save", 1)]
)
def test_the_error_names_the_step_at_which_a_process_was_lost(step, after):
    codes = processes.run(jobs.loses_one, 3, step, after, signal.SIGKILL, group_timeout=30)
    assert codes == [0, 0, -signal.SIGKILL]


def test_processes_do_not_wait_for_a_stopped_one_for_ever():
    codes = processes.run(jobs.loses_one, 2, "search", 2, signal.SIGSTOP, group_timeout=4, stopped=1)
    assert codes == [0, -signal.SIGSTOP]


def test_an_interrupted_save_keeps_the_previous_checkpoint(tmp_path):
    codes = processes.run(jobs.interrupted_save, 2, str(tmp_path), group_timeout=30)
    assert codes == [0, -signal.SIGKILL]
    assert processes.run(jobs.restores, 3, str(tmp_path)) == [0, 0, 0]


def sent_bytes(s: traffic.Setting) -> dict[str, float]:
    """The formulas of docs/distributed.md: bytes that a process sends in each step; float32, sharded by rows."""
    others = s.processes - 1
    moved = s.vectors / s.processes * others / s.processes * (4 * s.d + 16)
    reduced = traffic.NITER * s.nlist * (4 * s.d + 8) + (s.nlist + 256) * 4 * s.d
    return {
        "train": 2 * others / s.processes * reduced + others / s.processes * s.nlist * 4 * s.d,
        "add": moved,
        "search": s.queries * others * (4 * s.d + 4 * s.nprobe + 12 * s.k),
        "save": moved,
    }


@pytest.mark.skipif(sys.platform != "linux", reason="the bytes sent are counted by the kernel of Linux")
def test_bytes_sent_are_as_documented():
    setting = traffic.Setting(2, vectors=8_000, nlist=64, queries=400)
    found, formula = traffic.measure(setting), sent_bytes(setting)
    for step in traffic.STEPS:
        assert found[step] == pytest.approx(formula[step], rel=0.05), step


def test_without_a_process_group():
    with pytest.raises(RuntimeError, match="init_process_group"):
        ShardedIndex(jobs.empty())
