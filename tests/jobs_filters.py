"""What the processes of a group run with a filter for each query; see jobs.py."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.jobs import QUERIES, ROUNDING, K, N, built, mine, single_of
from tests.oracle import agree
from torch_ivf_module import SearchParams


def chosen(rank: int, size: int, queries: int, name: str) -> dict[str, Any]:
    """A filter for each of the queries of this process, of another width than those of other processes."""
    generator = torch.Generator().manual_seed(rank)
    masks = torch.rand(queries, N - rank, generator=generator) < 0.3
    lists = [torch.nonzero(row)[:, 0] for row in masks]
    exclude = torch.randint(-1, N, (queries, 5 * rank), generator=generator)
    return {
        "masks": {"selector": masks},
        "lists": {"selector": lists},
        "few": {"selector": [ids[:3] for ids in lists]},
        "exclude": {"exclude": exclude},
        "masks, exclude": {"selector": masks, "exclude": exclude.int()},
        "lists, exclude": {"selector": lists, "exclude": exclude},
    }[name]


def sharded(rank: int, size: int, shard: str) -> None:
    """A sharded index answers as one index: each process has filters of its own."""
    index = built(rank, size, "l2", shard)
    single, own = single_of(index), mine(QUERIES, rank, size)
    for name in ("masks", "lists", "few", "exclude", "masks, exclude", "lists, exclude"):
        params = SearchParams(**chosen(rank, size, len(own), name))
        expected = single.search(own, K, params=params)
        agree(index.search(own, K, params=params), expected, atol=ROUNDING)
        radii = single.search(own, 20)[0][:, -1]
        found = [where.range_search(own, radii + ROUNDING, params=params) for where in (index, single)]
        assert found[0][0].tolist() == found[1][0].tolist()
        assert found[0][2].sort().values.tolist() == found[1][2].sort().values.tolist()
    params = SearchParams(**chosen(rank, size, len(own), "masks" if rank else "lists"))
    with pytest.raises(RuntimeError, match="rank 1 called another method than rank 0"):
        index.search(own, K, params=params)
    wrong = SearchParams(exclude=torch.ones(len(own) + (rank == 1), 2, dtype=torch.int64))
    error = (ValueError, "exclude must have a row") if rank == 1 else (RuntimeError, "rank 1 refused its input")
    with pytest.raises(error[0], match=error[1]):
        index.search(own, K, params=wrong)
