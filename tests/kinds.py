"""Kinds of index for the tests of adding, removing, reading and loading.

d dim.
"""

from __future__ import annotations

import functools
from collections import OrderedDict
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.datasets import PLAIN, normal
from tests.oracle import agree, decoded
from tests.problems import flat, flat_codes, shared
from torch_ivf_module import IndexFlatIP, IndexFlatL2, IndexIVFFlat, IndexIVFScalarQuantizer, IndexScalarQuantizer
from torch_ivf_module.functional.row_codes import encode

BUFFERS = ["centroids", "packed_embeddings", "list_offsets", "list_ids", "next_id"]  # of an index of floats

# Filled; each call gives an index, its vectors and queries.
KINDS = {"ivf": shared, "flat": flat, "codes": functools.partial(shared, bits=8), "flat codes": flat_codes}
each_kind = pytest.mark.parametrize("kind", KINDS)


def trained(d: int = 8, nlist: int = 4, kind: Any = IndexIVFFlat, **settings: Any) -> Any:
    """A trained, empty inverted file that probes all its lists."""
    index = kind(d, nlist=nlist, nprobe=nlist, **settings)
    index.train(normal(40 * nlist, d, seed=1))
    return index


EMPTY = {
    "ivf": trained,
    "flat": lambda **settings: IndexFlatL2(8, **settings),
    "codes": functools.partial(trained, kind=IndexIVFScalarQuantizer),
    "flat codes": lambda **settings: IndexScalarQuantizer(8, **settings),
}
each_empty = pytest.mark.parametrize("empty", EMPTY.values(), ids=EMPTY)

STORED = {
    "l2": lambda: shared(PLAIN, "l2"),
    "cosine": lambda: shared(PLAIN, "cosine"),
    "half": lambda: shared(PLAIN, "ip", torch.float16),
    "flat": lambda: flat(PLAIN, "l2"),
    "codes": lambda: shared(PLAIN, "l2", bits=8),
    "cosine codes": lambda: shared(PLAIN, "cosine", bits=4),
    "flat codes": lambda: flat_codes(PLAIN, "ip"),
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


def buffers_of(index: Any) -> list[str]:
    """The entries of the state_dict of an index of any kind."""
    return [BUFFERS[0], "packed_codes" if "bits" in index.config() else BUFFERS[1], *BUFFERS[2:]]


def fresh(index: Any, **settings: Any) -> Any:
    """An empty index of the same kind and, unless `settings` say otherwise, of the same shape."""
    config = {**index.config(), "dtype": index.dtype}
    if type(index) in (IndexFlatL2, IndexFlatIP):
        del config["metric"]
    return type(index)(**{**config, **settings})


def as_stored(index: Any, x: Tensor) -> Tensor:
    """The vectors (n, d) that an index stores of vectors x (n, d) by l2 or ip."""
    if index.store.format.name == "packed_embeddings":
        return x.to(index.dtype)
    return decoded(encode(x, index.config()["bits"]), index.d).float()


def same_answers(one: Any, other: Any, queries: Tensor) -> None:
    """Assert that two indexes give the same answers."""
    agree(one.search(queries, 10), other.search(queries, 10), rtol=1e-6, atol=1e-6)


def pending_removals(index: Any) -> bool:
    """Whether deleted rows are still in the buffers."""
    return bool(index.store._updates)
