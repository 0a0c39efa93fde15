"""Functions without an index: neighbours, distances, normalisation, threads.

Q queries, N vectors, d dim, k results.
"""

from __future__ import annotations

from typing import Any

import numpy
import torch
from torch import Tensor

from ..index.pre_transform import Normalize
from .arrays import device_of, returned, rows
from .constants import METRIC_L2, metric_name
from .flat import IndexFlat


def knn(xq: Any, xb: Any, k: int, metric: int = METRIC_L2, metric_arg: float = 0.0) -> tuple[Any, Any]:
    """The k nearest of xb (N, d) for each of xq (Q, d): D and I (Q, k).

    >>> knn(numpy.eye(2), numpy.eye(2), 1)[1].tolist()
    [[0], [1]]
    """
    base = rows(xb, xq.shape[1], device_of(xb), "xb")
    index = IndexFlat(base.shape[1], metric)
    index.module.to(base.device)
    index.add(base)
    return index.search(xq, k)


def knn_gpu(
    res: Any,
    xq: Any,
    xb: Any,
    k: int,
    D: Any = None,
    I: Any = None,
    metric: int = METRIC_L2,
    device: int = -1,
    **limits: Any,
) -> tuple[Any, Any]:
    """`knn` where the tensors are; arrays are moved to the GPU number `device`, the first by default."""
    where = torch.device("cuda", max(0, device))
    queries, base = (x if isinstance(x, Tensor) else rows(x, x.shape[1], where) for x in (xq, xb))
    found, ids = knn(queries, base, k, metric)
    return returned(found, xq, D), returned(ids, xq, I)


def pairwise_distances(xq: Any, xb: Any, metric: int = METRIC_L2, metric_arg: float = 0) -> Any:
    """The distances (Q, N) of all pairs of xq (Q, d) and xb (N, d).

    >>> pairwise_distances(numpy.zeros((1, 2)), numpy.array([[3.0, 4.0]]))
    array([[25.]], dtype=float32)
    """
    one, other = (rows(x, xq.shape[1], device_of(x), name).float() for x, name in ((xq, "xq"), (xb, "xb")))
    if metric_name(metric) == "ip":
        return returned(one @ other.T, xq)
    return returned(torch.cdist(one, other, compute_mode="donot_use_mm_for_euclid_dist").square(), xq)


def normalize_L2(x: Any) -> None:
    """Scale the rows of x (n, d) to unit length in place; rows of zeros stay. TypeError unless x is C-ordered float32.

    >>> x = numpy.array([[3.0, 4.0]], dtype="float32")
    >>> normalize_L2(x)
    >>> x
    array([[0.6, 0.8]], dtype=float32)
    """
    dense = x.is_contiguous() if isinstance(x, Tensor) else x.flags["C_CONTIGUOUS"]
    if str(x.dtype).removeprefix("torch.") != "float32" or not dense:
        raise TypeError(f"x must be a C-ordered array of float32, got {x.dtype}; it is changed in place")
    found = rows(x, x.shape[1], device_of(x))
    unit = Normalize()(found)
    if isinstance(x, Tensor):
        x.data.copy_(unit)
    else:
        numpy.copyto(x, unit.numpy())


def omp_set_num_threads(num_threads: int) -> None:
    """`torch.set_num_threads`."""
    torch.set_num_threads(num_threads)


def omp_get_max_threads() -> int:
    """`torch.get_num_threads`."""
    return torch.get_num_threads()


def get_compile_options() -> str:
    """What computes: torch and its version."""
    return f"torch_{torch.__version__}"
