"""Functions that the processes of tests/test_sharded.py run; they compare with one index of all vectors."""

from __future__ import annotations

import os
import pickle
import signal
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.filesystem import FileSystemWriter
from torch.distributed.checkpoint.state_dict import get_model_state_dict, set_model_state_dict
from torch.distributed.fsdp import fully_shard

from tests.datasets import normal
from tests.oracle import agree, check_range, probed, stored_rows
from tests.problems import METRICS, few_training_rows
from torch_ivf_module import IndexFlatL2, IndexIVFFlat, SearchParams, ShardedIndex, check_ddp, ignore_in_ddp
from torch_ivf_module.dcp import IndexLoadPlanner
from torch_ivf_module.index import training
from torch_ivf_module.index.store import ListStore
from torch_ivf_module.sharded import newest
from torch_ivf_module.sharded.collectives import Exchange

N, D, L, K = 500, 12, 16, 10
ROUNDING = 1e-5  # of an inner product of such vectors
SHARDS = ("rows", "lists")
BASE, QUERIES = normal(N, D, seed=1), normal(37, D, seed=2)


def mine(x: Tensor, rank: int, size: int) -> Tensor:
    """The rows of one process, unevenly divided; with several processes the first has none."""
    ends = {1: [0, 1], 2: [0, 0, 1], 3: [0, 0.2, 0.7, 1], 4: [0, 0, 0.6, 0.7, 1]}[size]
    start, end = (int(len(x) * fraction) for fraction in ends[rank : rank + 2])
    return x[start:end]


def empty(metric: str = "l2", **settings: Any) -> IndexIVFFlat:
    return IndexIVFFlat(D, nlist=L, nprobe=4, metric=metric, k=K, **settings)


def built(rank: int, size: int, metric: str = "l2", shard: str = "rows", **settings: Any) -> ShardedIndex:
    index = ShardedIndex(empty(metric, **settings), shard=shard)
    with few_training_rows():
        index.train(mine(BASE, rank, size), niter=5)
    index.add(mine(BASE, rank, size))
    return index


def single_of(index: ShardedIndex, x: Tensor = BASE, ids: Tensor | None = None, **settings: Any) -> IndexIVFFlat:
    """One index with the same centroids and these vectors."""
    single = empty(index.metric, **settings)
    state = {**single.state_dict(), "centroids": index.centroids, "list_offsets": torch.zeros(L + 1, dtype=torch.int64)}
    single.load_state_dict(state)
    single.add_with_ids(x, torch.arange(len(x)) if ids is None else ids)
    return single


def same_answers(index: ShardedIndex, single: Any, rank: int, size: int, queries: Tensor = QUERIES) -> None:
    """Assert the answers of `single` to this process's queries: search, range search, max_codes, selectors."""
    own = mine(queries, rank, size)
    assert index.ntotal == single.ntotal
    for k in (1, K, N + 7):
        agree(index.search(own, k), single.search(own, k), atol=ROUNDING)
    agree(index(own), single(own), atol=ROUNDING)
    for params in (SearchParams(nprobe=1), SearchParams(profile="exact", nprobe=L), SearchParams(max_codes=60)):
        agree(index.search(own, K, params=params), single.search(own, K, params=params), atol=ROUNDING)
    for selector in (torch.arange(0, N, 3), torch.arange(N) % 2 == 0, torch.tensor([3, 10**9])):
        params = SearchParams(selector=selector)
        agree(index.search(own, K, params=params), single.search(own, K, params=params), atol=ROUNDING)
    radii = single.search(own, 5)[0][:, -1].nan_to_num(posinf=0, neginf=0)
    counts = [where.range_search(own, radii + ROUNDING)[0] for where in (index, single)]
    assert counts[0].tolist() == counts[1].tolist()
    radius = float(single.search(queries, 5)[0][:, -1].nanmedian())
    lists = None if single.store.flat else probed(single, own)
    check_range(index.range_search(own, radius), own, stored_rows(single), index.metric, radius, lists)


def matrix(rank: int, size: int, shard: str) -> None:
    for metric in METRICS:
        index = built(rank, size, metric, shard)
        trained = empty(metric)
        with few_training_rows():
            trained.train(BASE, niter=5)
        torch.testing.assert_close(index.centroids, trained.centroids, rtol=1e-4, atol=1e-5)
        single = single_of(index)
        same_answers(index, single, rank, size)
        info = index.info()
        assert sum(info["rows"]) == info["ntotal"] == N
        assert max(info["rows"]) - min(info["rows"]) <= (1 if shard == "rows" else N // L)

        # Every process removes some ids, including a duplicate and an unknown one.
        removed = torch.arange(rank, 120, size)
        assert index.remove_ids(torch.cat([removed, torch.tensor([7, 10**9])])) == 120
        assert single.remove_ids(torch.arange(120)) == 120
        mask = torch.zeros(200, dtype=torch.bool)
        mask[130 + rank] = True
        assert index.remove_ids(mask) == size
        single.remove_ids(torch.arange(130, 130 + size))
        more = normal(90, D, seed=3)
        ids = torch.arange(-100, -10)
        index.add_with_ids(mine(more, rank, size), mine(ids, rank, size))
        single.add_with_ids(more, ids)
        index.add(mine(normal(3, D, seed=4), rank, size))
        single.add(normal(3, D, seed=4))
        same_answers(index, single, rank, size)
        index.rebalance()
        same_answers(index, single, rank, size)


def edges(rank: int, size: int, shard: str) -> None:
    """Fewer vectors than processes, no vectors, bad queries, half precision, new centroids, a plain index."""
    index = built(rank, size, shard=shard)
    bad = QUERIES.clone()
    bad[::5] = torch.nan
    bad[1::7] = torch.inf
    single = single_of(index)
    same_answers(index, single, rank, size, bad)
    with few_training_rows():
        index.train(mine(BASE + 0.1, rank, size), niter=2, seed=5)
    same_answers(index, single_of(index), rank, size)
    index.reset()
    assert index.ntotal == 0
    assert (index.search(mine(QUERIES, rank, size), K)[1] == -1).all()
    index.add(mine(BASE[:3], rank, size))
    same_answers(index, single_of(index, BASE[:3], torch.arange(3)), rank, size)

    # A sample of the rows, drawn by a generator.
    settings = {"niter": 3, "max_points_per_centroid": 8}
    trained = empty()
    with few_training_rows():
        index.train(mine(BASE, rank, size), generator=torch.Generator().manual_seed(3), **settings)
        trained.train(BASE, generator=torch.Generator().manual_seed(3), **settings)
    torch.testing.assert_close(index.centroids, trained.centroids, rtol=1e-4, atol=1e-5)
    # Repeated rows give empty clusters, which all processes fill in the same way.
    repeated = BASE[: L - 2].repeat(12, 1)
    with few_training_rows():
        index.train(mine(repeated, rank, size))
        trained.train(repeated)
    torch.testing.assert_close(index.centroids, trained.centroids, rtol=1e-4, atol=1e-5)

    index = ShardedIndex(single_of(index), shard=shard)  # every process has all rows, and keeps its shard
    assert index.index.ntotal < N or size == 1
    same_answers(index, single_of(index), rank, size)
    index = built(rank, size, shard=shard, dtype=torch.bfloat16)
    agree(
        index.search(QUERIES[rank:9], K),
        single_of(index, dtype=torch.bfloat16).search(QUERIES[rank:9], K),
    )
    if shard == "rows":
        flat, single = ShardedIndex(IndexFlatL2(D)), IndexFlatL2(D)
        flat.train(mine(BASE, rank, size)).add(mine(BASE, rank, size))
        single.add(BASE)
        same_answers(flat, single, rank, size)
        loaded = ShardedIndex(IndexFlatL2(D))
        loaded.load_state_dict(flat.state_dict())
        same_answers(loaded, single, rank, size)
    fresh = built(rank, size, shard=shard)
    fresh.load_state_dict(ShardedIndex(empty(), shard=shard).state_dict())
    assert fresh.ntotal == 0
    assert not fresh.is_trained
    _has_no_derivative(index)


def _has_no_derivative(index: ShardedIndex) -> None:
    """D does not require grad; forward mode and transforms, which would give zeros, are refused."""
    x = QUERIES[:2]
    assert not index.search(x.clone().requires_grad_(), K)[0].requires_grad
    for name, search in (("search", lambda x: index(x)[0]), ("range_search", lambda x: index.range_search(x, 1.0)[1])):
        refusal = pytest.raises(RuntimeError, match=rf"{name} of a ShardedIndex has no derivative.*detach x")
        with torch.autograd.forward_ad.dual_level(), refusal:
            search(torch.autograd.forward_ad.make_dual(x, x))
        with refusal:
            torch.func.grad(lambda x, search=search: search(x).sum())(x)


def in_a_group(rank: int, size: int, folder: str) -> None:
    """All processes but the first form a group, with other ranks in it."""
    group = dist.new_group(list(range(1, size)))
    if rank == 0:
        with pytest.raises(ValueError, match="does not contain"):
            ShardedIndex(empty(), process_group=group)
        return
    index = ShardedIndex(empty(), process_group=group, shard="lists")
    with few_training_rows():
        index.train(mine(BASE, rank - 1, size - 1))
    index.add(mine(BASE, rank - 1, size - 1))
    index.nprobe = 7
    single = single_of(index)
    single.nprobe = 7
    same_answers(index, single, rank - 1, size - 1)
    index.save(folder)
    again = ShardedIndex(empty(), process_group=group).restore(folder)
    again.nprobe = 7
    same_answers(again, single, rank - 1, size - 1)


def only_one_refuses(rank: int, error: type[Exception], match: str, step: str) -> Any:
    """Expects this error on rank 1, and on the others the error that rank 1 refused its input."""
    expected = (error, match) if rank == 1 else (RuntimeError, f"{step}: rank 1 refused its input")
    return pytest.raises(expected[0], match=expected[1])


def _one_process_is_wrong(index: ShardedIndex, rank: int) -> None:
    wrong = torch.full((2, D), torch.nan) if rank == 1 else BASE[:2]
    with only_one_refuses(rank, ValueError, "row 0", "add"):
        index.add(wrong)
    with only_one_refuses(rank, ValueError, "x must have shape", "search"):
        index(torch.empty(2, 0) if rank == 1 else QUERIES)
    with only_one_refuses(rank, AttributeError, "get_state", "train"):
        index.train(BASE, generator="no generator" if rank == 1 else torch.Generator())
    with only_one_refuses(rank, TypeError, "selector must be int64", "search"):
        index.search(QUERIES, K, params=SearchParams(selector=torch.ones(3) if rank == 1 else torch.arange(3)))
    with only_one_refuses(rank, ValueError, "shard must be", "ShardedIndex"):
        ShardedIndex(empty(), shard="columns" if rank == 1 else "rows")
    with only_one_refuses(rank, TypeError, "flat or inverted-file", "ShardedIndex"):
        ShardedIndex(nn.Linear(2, 2) if rank == 1 else empty())  # type: ignore[arg-type]
    with only_one_refuses(rank, TypeError, "PathLike", "save"):
        index.save(None if rank == 1 else "/nowhere")  # type: ignore[arg-type]
    refused = (ValueError, "x must have shape") if rank == 0 else (RuntimeError, "search: rank 0 refused its input")
    with pytest.raises(refused[0], match=refused[1]):
        index(QUERIES[:, 1:] if rank == 0 else QUERIES)


def _calls_differ(index: ShardedIndex, rank: int) -> None:
    with pytest.raises(RuntimeError, match="search: rank 1 called another method"):
        index.search(QUERIES, K + rank)
    chosen = torch.arange(5000) != 2500 + rank  # printed with "...", so that they look the same
    with pytest.raises(RuntimeError, match="search: rank 1 called another method"):
        index.search(QUERIES, K, params=SearchParams(selector=chosen))
    with pytest.raises(RuntimeError, match="rank 1 called another method"):
        index.reset() if rank == 0 else index.search(QUERIES, K)
    with pytest.raises(RuntimeError, match="rank 1 called another method"):
        ShardedIndex(empty(max_codes=5 + rank))
    with pytest.raises(RuntimeError, match="rank 1 called another method"):
        ShardedIndex(single_of(index, ids=torch.arange(N) + rank))


def refusals(rank: int, size: int) -> None:
    index = built(rank, size)
    before = index.search(QUERIES, K)
    _one_process_is_wrong(index, rank)
    _calls_differ(index, rank)
    torch.set_printoptions(edgeitems=1 + rank)  # equal tensors then print differently
    params = SearchParams(selector=torch.arange(5000))
    agree(index.search(QUERIES, K, params=params), before)
    torch.set_printoptions(profile="default")
    with pytest.raises(ValueError, match="budget"):
        index.search(QUERIES, K, params=SearchParams(candidate_budget=100))
    with pytest.raises(ValueError, match="at least 16"):
        ShardedIndex(empty()).train(mine(BASE[:9], rank, size))
    with pytest.raises(RuntimeError, match="trained"):
        ShardedIndex(empty()).add(BASE[:1])
    with pytest.raises(ValueError, match="inverted file"):
        ShardedIndex(IndexFlatL2(D), shard="lists")
    for dump in (pickle.dumps, lambda index: torch.save(index, os.devnull)):
        with pytest.raises(TypeError, match=r"use save\(folder\)"):
            dump(index)
    agree(index.search(QUERIES, K), before)
    agree(deepcopy(index).search(QUERIES, K), before)
    assert index.ntotal == N
    assert f"rank={rank} of 2, shard='rows', ntotal={N}" in repr(index)
    assert (index.nlist, index.dtype, index.device) == (L, torch.float32, index.centroids.device)
    assert index.config() == empty().config()
    assert not hasattr(ShardedIndex(IndexFlatL2(D)), "nlist")
    before = index.index.store.buffers["packed_embeddings"]
    assert index.remove_ids(torch.tensor([3])) == 1
    index.search(QUERIES, K)
    assert index.index.store.buffers["packed_embeddings"] is before  # small removals are not packed
    for shard in SHARDS:
        _half_done(rank, size, shard)


def _half_done(rank: int, size: int, shard: str) -> None:
    """A call that fails on one process changes the index on none."""
    index = built(rank, size, shard=shard)
    index.add(mine(BASE[:5], rank, size))  # pending rows
    single = single_of(index, torch.cat([BASE, BASE[:5]]))

    move_to = training.move_to

    def move_and_fail(store: ListStore, centroids: Tensor) -> int:
        move_to(store, centroids)
        raise MemoryError("no room")

    with pytest.MonkeyPatch.context() as patch:
        if rank == 1:
            patch.setattr(training, "move_to", move_and_fail)
        with few_training_rows(), only_one_refuses(rank, MemoryError, "no room", "train"):
            index.train(mine(BASE + 1, rank, size), niter=2)
    same_answers(index, single, rank, size)

    # A full state and a sharded one, each wrong on one process.
    full = {name: tensor.clone() for name, tensor in single.state_dict().items()}
    sharded = index.state_dict()
    for state, ids in ((full, full["list_ids"]), (sharded, sharded["list_ids"].to_local())):
        if rank == 1:
            ids[0] = -1
        match = "holds -1" if rank == 1 else "load_state_dict: rank 1 refused its input"
        with pytest.raises(RuntimeError, match=match):
            index.load_state_dict(state)
        same_answers(index, single, rank, size)
    full["list_ids"][0] = 10**6 + rank
    text = "load_state_dict: rank 1 called another method than rank 0, or with other settings"
    with pytest.raises(RuntimeError, match=text):
        index.load_state_dict(full)
    same_answers(index, single, rank, size)


def saves(rank: int, size: int, folder: str, shard: str) -> None:
    index = built(rank, size, shard=shard)
    index.remove_ids(torch.arange(20))
    index.save(folder)
    torch.save({"centroids": index.centroids, "next_id": index.next_id}, f"{folder}/expected.pt")


def loads(rank: int, size: int, folder: str, shard: str) -> None:
    """Load the checkpoint of `saves` or of a plain index, change the index, and save it again."""
    index = ShardedIndex(empty(), shard=shard).restore(folder)
    expected = torch.load(f"{folder}/expected.pt")
    assert torch.equal(index.centroids, expected["centroids"])
    assert index.next_id == expected["next_id"]
    kept = torch.arange(20, N)
    single = single_of(index, BASE[kept], kept)
    same_answers(index, single, rank, size)
    index.add(mine(BASE[:5], rank, size))
    single.add(BASE[:5])
    same_answers(index, single, rank, size)
    other = ShardedIndex(empty(), shard="rows")
    other.load_state_dict(index.state_dict())
    same_answers(other, single, rank, size)
    other.load_state_dict(single.state_dict())  # the state of a plain index, on every process
    same_answers(other, single, rank, size)
    damaged = {**single.state_dict(), "list_offsets": single.list_offsets + 1}
    with pytest.raises(RuntimeError, match="list_offsets must run from 0"):
        other.load_state_dict(damaged)
    same_answers(other, single, rank, size)
    index.remove_ids(torch.arange(N, N + 5))
    before = newest(folder)
    index.save(folder)
    assert newest(folder) != before


def in_models(rank: int, size: int, folder: str) -> None:
    """DDP and FSDP2 do not change the vectors of each process, and a checkpoint of the model contains all of them."""
    x = normal(6, 8, seed=rank)
    encoder = nn.Linear(8, D)
    nn.init.ones_(encoder.weight)
    index = built(rank, size)
    model = nn.Sequential(encoder, index)
    single = single_of(index)
    rows = index.index.list_ids.clone()
    wrapped = nn.parallel.DistributedDataParallel(model)
    agree(wrapped(x), single(encoder(x)))
    sharded = fully_shard(nn.Sequential(fully_shard(nn.Linear(8, D)), index))
    sharded(x)
    assert torch.equal(index.index.list_ids, rows)
    assert not list(model.buffers())
    saved = get_model_state_dict(sharded)
    dcp.save({"model": saved}, checkpoint_id=folder)
    fresh = nn.Sequential(nn.Linear(8, D), ShardedIndex(empty(), shard="lists"))
    fully_shard(fresh)
    state = {"model": get_model_state_dict(fresh)}
    dcp.load(state, checkpoint_id=folder, planner=IndexLoadPlanner())
    set_model_state_dict(fresh, state["model"])
    assert fresh[1].ntotal == N
    agree(fresh(x), sharded(x))


# --- faults -------------------------------------------------------------------------------------------------


@contextmanager
def ends_in(step: str, after: int, signal_number: int) -> Iterator[None]:
    """Sends this process a signal before exchange number `after` of a step."""
    run, seen = Exchange.run, []

    def run_or_die(self: Exchange, name: str, *rest: Any) -> Any:
        seen.append(name)
        if seen.count(step) > after:
            os.kill(os.getpid(), signal_number)
        return run(self, name, *rest)

    Exchange.run = run_or_die  # type: ignore[method-assign]
    yield
    raise AssertionError(f"{step} has only {seen.count(step)} exchanges")


def loses_one(rank: int, size: int, step: str, after: int, signal_number: int) -> None:
    index = built(rank, size)
    steps = {
        "train": lambda: index.train(mine(BASE, rank, size)),
        "add": lambda: index.add(mine(BASE, rank, size)),
        "search": lambda: index.search(QUERIES, K),
        "save": lambda: index.save("/nowhere"),
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if rank == size - 1:
            with ends_in(step, after, signal_number):
                steps[step]()
        else:
            centroids, rows = index.centroids.clone(), index.index.ntotal
            with pytest.raises(
                RuntimeError, match=f"^{step}: rank {rank} of {size}: another process may have ended"
            ) as caught:
                steps[step]()
            assert caught.value.__cause__ is not None
            assert torch.equal(index.centroids, centroids)
            assert (index.ntotal, index.index.ntotal) == (N, rows)


def interrupted_save(rank: int, size: int, folder: str) -> None:
    index = built(rank, size)
    index.save(folder)
    dist.barrier()
    index.reset()
    index.add(mine(BASE[:11], rank, size))
    if rank == size - 1:
        write = FileSystemWriter.write_data

        def write_and_die(self: Any, *rest: Any) -> None:
            write(self, *rest).wait()
            os.kill(os.getpid(), signal.SIGKILL)

        FileSystemWriter.write_data = write_and_die  # type: ignore[method-assign,assignment]
        index.save(folder)
    with pytest.raises(RuntimeError, match=r"^save: .* the one before it, if any, is untouched"):
        index.save(folder)
    assert Path(folder, "index-000002").exists()
    assert newest(folder).name == "index-000001"


def restores(rank: int, size: int, folder: str) -> None:
    """Restore when only rank 0 reads the right `newest` file, and save in a folder with other files."""
    foreign = ["7", "index-2", "index-000001b"]
    seen = Path(folder)
    if rank == 0:
        for name in foreign:
            Path(folder, name).mkdir()
    else:
        seen = Path(f"{folder}-{rank}")
        seen.mkdir()
        (seen / "index-000001").symlink_to(Path(folder, "index-000001"))
        (seen / "newest").write_text("index-000002")
    index = ShardedIndex(empty()).restore(seen)
    same_answers(index, single_of(index), rank, size)
    index.save(folder)
    assert sorted(part.name for part in Path(folder).iterdir()) == sorted([*foreign, "index-000003", "newest"])


def _model_of(rows: int) -> nn.Sequential:
    index = IndexFlatL2(D)
    index.add(BASE[:rows])
    return nn.Sequential(nn.Linear(D, D), index)


def checked_with_different_rows(rank: int, size: int) -> None:
    """DDP compares the shapes of parameters only; `check_ddp` refuses different indexes, on every rank."""
    wrap = nn.parallel.DistributedDataParallel
    for rows in ((10, 20), (20, 10), (0, 5)):
        shapes = rf"\({rows[0]}, {D}\) on rank 0 and \({rows[1]}, {D}\) on rank 1"
        model = _model_of(rows[rank])
        with pytest.raises(RuntimeError, match=rf"1\.packed_embeddings has shape {shapes}.*ignore_in_ddp"):
            check_ddp(model)
        assert model[1].ntotal == rows[rank]
        assert "1.packed_embeddings" in ignore_in_ddp(model)
        check_ddp(model)
        assert wrap(model).module[1].ntotal == rows[rank]
        check_ddp(model, [dist.new_group([other]) for other in range(size)][rank])
    with pytest.raises(RuntimeError, match=r"2\.centroids has shape None on rank 0 and \(0, 12\) on rank 1"):
        check_ddp(nn.Sequential(*_model_of(5), *_model_of(5)[1:] if rank else ()))
    equal = _model_of(50)
    check_ddp(equal)
    agree(wrap(equal)(QUERIES), equal(QUERIES))
    # An index alone, and no index at all.
    check_ddp(equal[1])
    check_ddp(equal[0])


def growing_apart_after_wrapping(rank: int, size: int) -> None:
    """The buffer of rank 0 overwrites a part of a longer buffer, which is then inconsistent."""
    model = _model_of(50)
    wrapped = nn.parallel.DistributedDataParallel(model)
    model[1].add(BASE[: 1 + rank])
    if rank:
        with pytest.raises(RuntimeError, match=r"(?s)DistributedDataParallel.*ignore_in_ddp"):
            wrapped(QUERIES)
    else:
        wrapped(QUERIES)
