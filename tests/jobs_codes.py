"""What the processes of a group run with indexes of codes; see jobs.py."""

from __future__ import annotations

from typing import Any

import torch

from tests.jobs import BASE, D, L, N, mine, same_answers
from tests.problems import few_training_rows
from torch_ivf_module import IndexIVFScalarQuantizer, IndexScalarQuantizer, ShardedIndex


def sharded(rank: int, size: int, shard: str, folder: str) -> None:
    """A sharded index of codes answers as one index, and its checkpoint opens as both."""

    def empty() -> Any:
        return IndexIVFScalarQuantizer(D, nlist=L, nprobe=4, k=10, bits=4)

    index = ShardedIndex(empty(), shard=shard)
    with few_training_rows():
        index.train(mine(BASE, rank, size), niter=5)
    index.add(mine(BASE, rank, size))
    single = empty()
    offsets = torch.zeros(L + 1, dtype=torch.int64)
    single.load_state_dict({**single.state_dict(), "centroids": index.centroids, "list_offsets": offsets})
    single.add(BASE)
    same_answers(index, single, rank, size)
    with few_training_rows():
        index.train(mine(BASE, rank, size), niter=1)  # moves rows to other lists
    index.rebalance()
    index.save(folder)
    again = ShardedIndex(empty(), shard="rows").restore(folder)
    assert again.ntotal == N
    single.reset_parameters()
    single.load_state_dict({name: full(tensor) for name, tensor in index.state_dict().items()})
    same_answers(again, single, rank, size)
    assert torch.equal(single.packed_codes[single.list_ids.argsort()], codes_of(BASE))
    whole = ShardedIndex(single, shard=shard)  # every process has all rows, and keeps its shard
    assert whole.ntotal == N
    if shard == "rows":
        flat, one = ShardedIndex(IndexScalarQuantizer(D)), IndexScalarQuantizer(D)
        flat.add(mine(BASE, rank, size))
        one.add(BASE)
        same_answers(flat, one, rank, size)


def full(tensor: Any) -> torch.Tensor:
    """A tensor that may be divided among the processes, in full."""
    whole: torch.Tensor = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
    return whole


def codes_of(x: torch.Tensor) -> torch.Tensor:
    """Coded rows of x in their order."""
    index = IndexScalarQuantizer(x.shape[1], 4)
    index.add(x)
    return index.packed_codes
