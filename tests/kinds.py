"""Kinds of index for the tests of adding, removing, reading and loading.

d dim.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.datasets import PLAIN, normal
from tests.oracle import agree
from tests.problems import flat, shared
from torch_ivf_module import IndexFlatL2, IndexIVFFlat

BUFFERS = ["centroids", "packed_embeddings", "list_offsets", "list_ids", "next_id"]

KINDS = {"ivf": shared, "flat": flat}  # filled; each call gives an index, its vectors and queries
each_kind = pytest.mark.parametrize("kind", KINDS)


def trained(d: int = 8, nlist: int = 4, **settings: Any) -> IndexIVFFlat:
    """A trained, empty inverted file that probes all its lists."""
    index = IndexIVFFlat(d, nlist=nlist, nprobe=nlist, **settings)
    index.train(normal(40 * nlist, d, seed=1))
    return index


EMPTY = {"ivf": trained, "flat": lambda **settings: IndexFlatL2(8, **settings)}
each_empty = pytest.mark.parametrize("empty", EMPTY.values(), ids=EMPTY)

STORED = {
    "l2": lambda: shared(PLAIN, "l2"),
    "cosine": lambda: shared(PLAIN, "cosine"),
    "half": lambda: shared(PLAIN, "ip", torch.float16),
    "flat": lambda: flat(PLAIN, "l2"),
}
each_stored = pytest.mark.parametrize("kind", STORED)


class Deep(nn.Module):
    """A model with a layer, and an index two levels down."""

    def __init__(self, index: Any) -> None:
        super().__init__()
        self.encoder = nn.Linear(16, 16)
        self.memory = nn.ModuleDict({"inner": nn.Sequential(OrderedDict(index=index))})

    @property
    def index(self) -> Any:
        """The index."""
        return self.memory["inner"].index


def fresh(index: Any, **settings: Any) -> Any:
    """An empty index of the same kind and, unless `settings` say otherwise, of the same shape."""
    settings = {"dtype": index.packed_embeddings.dtype, **settings}
    if isinstance(index, IndexIVFFlat):
        settings = {"nlist": index.nlist, "nprobe": index.nprobe, **settings}
        return IndexIVFFlat(index.d, metric=index.metric, **settings)
    return type(index)(index.d, **settings)


def same_answers(one: Any, other: Any, queries: Tensor) -> None:
    """Assert that two indexes give the same answers."""
    agree(one.search(queries, 10), other.search(queries, 10), rtol=1e-6, atol=1e-6)


def pending_removals(index: Any) -> bool:
    """Whether deleted rows are still in the buffers."""
    return bool(index.store._updates)
