"""What the processes of a group run to build a sharded index from files; see jobs.py."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as dcp

from tests.jobs import BASE, QUERIES, D, K, L, N
from tests.oracle import agree
from tests.problems import few_training_rows
from tests.states import same_state
from torch_ivf_module import IndexFlatL2, IndexIVFFlat, IndexIVFScalarQuantizer, ShardedIndex, build_file
from torch_ivf_module.dcp import IndexLoadPlanner
from torch_ivf_module.sharded import newest

MEMORY = 400_000
INDEXES = {
    "ivf": lambda: IndexIVFFlat(D, nlist=L, nprobe=4),
    "half": lambda: IndexIVFFlat(D, nlist=L, nprobe=4, metric="cosine", dtype=torch.float16),
    "codes": lambda: IndexIVFScalarQuantizer(D, nlist=L, nprobe=4, bits=4, metric="ip"),
    "flat": lambda: IndexFlatL2(D),
}


def builds(rank: int, size: int, folder: str) -> None:
    """A checkpoint built from files has the tensors and the answers of one that was built in memory."""
    path = Path(folder, "vectors.npy")
    if rank == 0:
        np.save(path, BASE.numpy())
    torch.distributed.barrier()
    for make in INDEXES.values():
        compared(rank, size, path, make)
    mine = range(N * rank // size, N * (rank + 1) // size)
    ids = torch.arange(N) * 3 - 71
    index = ShardedIndex(IndexFlatL2(D))
    build_file(path, folder, index, rows=mine, ids=ids)
    again = ShardedIndex(IndexFlatL2(D)).restore(folder)
    assert int(again.next_id) == int(ids.max()) + 1
    expected = IndexFlatL2(D)
    expected.add_with_ids(BASE, ids)
    agree(again.search(QUERIES, K), expected.search(QUERIES, K))


def compared(rank: int, size: int, path: Path, make: Any) -> None:
    mine = range(N * rank // size, N * (rank + 1) // size)
    index, trained, plain = ShardedIndex(make()), ShardedIndex(make()), make()
    with few_training_rows():
        built = build_file(path, path.parent, index, rows=mine, max_memory=MEMORY, niter=3)
        trained.train(BASE[mine.start : mine.stop], niter=3)
    assert (built.ntotal, index.ntotal) == (N, 0)
    offsets = trained.index.list_offsets
    plain.load_state_dict({**plain.state_dict(), "centroids": trained.centroids, "list_offsets": offsets})
    plain.add(BASE)
    found = make()
    dcp.load({"index": found}, checkpoint_id=newest(path.parent), planner=IndexLoadPlanner(), no_dist=True)
    assert same_state(found.state_dict(), plain.state_dict())
    agree(ShardedIndex(make()).restore(path.parent).search(QUERIES, K), plain.search(QUERIES, K))
    torch.distributed.barrier()


def refuses(rank: int, size: int, folder: str) -> None:
    """A row that one process refuses."""
    x = BASE.clone()
    x[5] = torch.nan if rank else 0
    says = "row 5 holds NaN" if rank else "rank 1 refused its input or failed"
    with pytest.raises((RuntimeError, ValueError), match=says), few_training_rows():
        build_file(x, Path(folder, "index"), ShardedIndex(IndexIVFFlat(D, nlist=L)), max_memory=MEMORY)
