"""The grid of cases: metrics, modes and dtypes to run a test over, and indexes built for the cases of `datasets`."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from tests.datasets import PLAIN, PROBLEMS, Problem, data
from torch_ivf_module import (
    IndexFlatIP,
    IndexFlatL2,
    IndexIVFFlat,
    IndexIVFScalarQuantizer,
    IndexScalarQuantizer,
)
from torch_ivf_module.functional.strategies import MODES as MODES  # the search modes

METRICS = ("l2", "ip", "cosine")
DTYPES = (torch.float32, torch.float16, torch.bfloat16)

each_metric = pytest.mark.parametrize("metric", METRICS)
each_flat_metric = pytest.mark.parametrize("metric", ["l2", "ip"])  # of IndexFlatL2 and IndexFlatIP
each_mode = pytest.mark.parametrize("mode", MODES)
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
each_bits = pytest.mark.parametrize("bits", [8, 4])
each_problem = pytest.mark.parametrize("case", PROBLEMS, ids=lambda case: case.name)


class Built(NamedTuple):
    index: Any
    base: Tensor
    queries: Tensor


@contextmanager
def few_training_rows() -> Iterator[None]:
    """Ignore the warning about few training rows, which small test indexes cannot avoid."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=r"(?s).*training rows for.*", category=UserWarning)
        yield


@contextmanager
def defaults(device: str | None = None, dtype: torch.dtype | None = None) -> Iterator[None]:
    """Set the default device and dtype of torch's factory functions."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype or before)
    try:
        with torch.device(device or "cpu"):
            yield
    finally:
        torch.set_default_dtype(before)


def ivf(
    problem: Problem = PLAIN, metric: str = "l2", dtype: torch.dtype = torch.float32, **settings: Any
) -> Built:
    """A new, trained and filled inverted file for a case; with `bits` one of codes."""
    train, base, queries = data(problem, dtype)
    settings = {"nlist": problem.nlist, "nprobe": problem.nprobe, "k": problem.k, **settings}
    kind = IndexIVFScalarQuantizer if "bits" in settings else IndexIVFFlat
    index = kind(problem.d, metric=metric, dtype=dtype, **settings)
    with few_training_rows():
        index.train(train, niter=4)
    index.add(base)
    return Built(index, base, queries)


@functools.cache
def _shared(problem: Problem, metric: str, dtype: torch.dtype, **settings: Any) -> Built:
    return ivf(problem, metric, dtype, **settings)


def shared(
    problem: Problem = PLAIN, metric: str = "l2", dtype: torch.dtype = torch.float32, **settings: Any
) -> Built:
    """As `ivf`, but a copy of an index that is built once; `settings` are attributes to set (``nprobe=3``)."""
    kind = {"bits": settings.pop("bits")} if "bits" in settings else {}
    index, base, queries = _shared(problem, metric, dtype, **kind)
    index = deepcopy(index)
    for name, value in settings.items():
        setattr(index, name, value)
    return Built(index, base, queries)


def flat(
    problem: Problem = PLAIN, metric: str = "l2", dtype: torch.dtype = torch.float32, **settings: Any
) -> Built:
    """A new, filled exhaustive index for a case; metric l2 or ip."""
    _, base, queries = data(problem, dtype)
    index = {"l2": IndexFlatL2, "ip": IndexFlatIP}[metric](problem.d, dtype=dtype, **settings)
    index.add(base)
    return Built(index, base, queries)


def flat_codes(problem: Problem = PLAIN, metric: str = "l2", bits: int = 8, **settings: Any) -> Built:
    """A new, filled exhaustive index of codes for a case."""
    _, base, queries = data(problem)
    index = IndexScalarQuantizer(problem.d, bits, metric, **settings)
    index.add(base)
    return Built(index, base, queries)
