"""The arguments of `build_file`, checked."""

from __future__ import annotations

import copy
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..advice import nlist_for
from ..checkpoint import AnyIndex, description
from ..index import IndexIVF, IndexIVFFlat, IndexPreTransform, validation
from ..index.base import IndexBase
from ..params import positive
from ..vector_files import Vectors, open_ids, open_vectors
from ..vector_files.vectors import vectors_of
from .plan import Plan, plan
from .steps import Source, plain

__all__ = ["Built", "opened", "planned_for", "template", "timed"]


class Built(NamedTuple):
    """What `build_file` has done."""

    index: Any  # an AnyIndex without its vectors: settings and centroids
    ntotal: int
    trained_on: int  # rows, 0 if it was not trained
    bytes: int  # of the file
    seconds: dict[str, float]  # of the steps train, assign, write


def opened(vectors: object, key: str | None, ids: object, rows: int | range | None) -> Source:
    """The arguments of `build_file` that say which rows are added."""
    if isinstance(vectors, (str, os.PathLike)):
        held = open_vectors(vectors, key)
    elif key is None:
        held = vectors_of(vectors)
    else:
        raise ValueError(f"key names an array of a file, but vectors are a {type(vectors).__name__}: leave key out")
    chosen = range(held.rows if rows is None else min(positive(rows, "rows"), held.rows)) if not isinstance(
        rows, range) else rows  # fmt: skip
    if chosen.step != 1 or not 0 <= chosen.start <= chosen.stop <= held.rows:
        raise ValueError(f"rows must be a number or a range of step 1 within 0 to {held.rows:,}, got {rows}")
    return Source(held, chosen, _ids(ids, vectors, held))


def _ids(ids: object, vectors: object, held: Vectors) -> Callable[[int, int], Tensor] | None:
    if ids is None:
        return None
    if isinstance(ids, (str, os.PathLike)):
        if not isinstance(vectors, (str, os.PathLike)):
            raise TypeError("ids must be a tensor or an array, not a file, because vectors are not a file")
        return open_ids(os.fspath(ids), Path(vectors), held.rows)
    given = validation.ids(ids, "ids", held.rows, torch.device("cpu"))
    return lambda start, end: given[start:end]


def template(index: AnyIndex | None, source: Source) -> AnyIndex:
    """A copy of an empty index that can be saved, or the usual one; without an order of its rows."""
    vectors = source.vectors
    if index is None:
        index = IndexIVFFlat(vectors.d, nlist=nlist_for(len(source.rows)), metric=vectors.metric or "l2")
    if not isinstance(index, (IndexBase, IndexPreTransform)):
        raise TypeError(f"index must be an index of this package or None, got {type(index).__name__}")
    description(index)
    if index.ntotal:
        raise ValueError(f"index must be empty, got one of {index.ntotal:,} vectors: call reset()")
    if index.d != vectors.d:
        raise ValueError(f"index must have d = {vectors.d}, the dimension of {vectors.name}, got {index.d}")
    made = copy.deepcopy(index)
    plain(made).store.ordering = "none"
    return made


def planned_for(
    index: AnyIndex, rows: int, train_rows: int | None, batch: int | None, max_memory: int
) -> Plan:
    """The plan for `rows` rows of all processes."""
    inner = plain(index)
    wanted = 0
    if isinstance(inner, IndexIVF) and not inner.is_trained:
        wanted = min(rows, 256 * inner.nlist if train_rows is None else positive(train_rows, "train_rows"))
        if wanted < inner.nlist:
            raise ValueError(f"vectors must have at least a row per list for {inner.nlist:,} lists, got {wanted:,}")
    elif train_rows is not None:
        raise ValueError("train_rows is for an index that is not trained yet: leave it out")
    size = None if batch is None else positive(batch, "batch")
    return plan(inner, rows, wanted, size, positive(max_memory, "max_memory"))


@contextmanager
def timed(seconds: dict[str, float], step: str) -> Iterator[None]:
    """Measure a step."""
    began = time.perf_counter()
    yield
    seconds[step] = time.perf_counter() - began
