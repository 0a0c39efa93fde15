"""Predicted time of a scan: the model behind search_mode="auto".

Q queries, L lists, P probes, d dim, k results, W rows that a query reads.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .block_maxima import GROUP, PRODUCT_PAYS, PRODUCT_SCORES, SECTION, SPAN
from .lists import InvertedLists
from .rescore import gathered_bytes
from .sampled_addmm import has_sampled_product


class Costs(NamedTuple):
    """Nanoseconds, with all threads of the device; *_dim is the cost per dimension of a vector."""

    candidate: float  # query-major: find a row, add its bias, select
    candidate_dim: float
    order: float  # list-major: the calls that every search makes in addition to those of a query-major one
    select: float  # list-major: the selections of one query
    survivor: float  # list-major: score one row of the selected groups again
    visit: float  # list-major: the calls for one list by matrix product
    row_dim: float  # list-major: read a row of a visited list
    product: float  # list-major: reduce one score of a matrix product
    product_dim: float
    sampled: float  # list-major: one score of the sampled product
    sampled_dim: float


# Fitted to the headline and the photographs, nq from 1 to 19,600, on two x86-64 cores with AVX2.
_CPU = Costs(8.0, 0.18, 1.4e6, 15e3, 60.0, 120e3, 0.15, 0.25, 0.0135, 8.0, 0.06)
# There is no sampled product for half precision: gathered vectors and visited lists are converted to float32.
_CPU_HALF = _CPU._replace(candidate=30.0, candidate_dim=1.2, survivor=180.0, row_dim=0.4)


def cheapest(
    x: Tensor, lists: InvertedLists, probed: Tensor, limits: Tensor | None, k: int, width: int
) -> tuple[str, str]:
    """The strategy with the lower predicted time for this batch, and why; on an accelerator see `_fewer_steps`."""
    queries, dim = x.shape
    if not x.is_cpu:
        return _fewer_steps(x, lists, probed, width)
    fused = has_sampled_product(x, lists.packed, SPAN)
    price = _CPU if fused else _CPU_HALF
    by_query = queries * width * (price.candidate + price.candidate_dim * dim)
    by_list = price.order + queries * (price.select + price.survivor * min(k * GROUP, width))
    if by_query <= by_list:
        return "matrix", _why(by_query, by_list)
    visits = torch.bincount(probed.flatten(), minlength=lists.sizes.shape[0])
    if limits is None:
        scores = visits * lists.sizes
    else:
        scores = torch.zeros_like(visits).scatter_add_(0, probed.flatten(), limits.flatten())
    sampled = (scores < PRODUCT_PAYS) & fused
    counts = [(scores * sampled).sum(), scores.sum(), (scores * ~sampled > 0).sum(), lists.sizes[visits > 0].sum()]
    by_samples, total, products, rows = torch.stack(counts).tolist()
    by_list += by_samples * (price.sampled + price.sampled_dim * dim) + rows * price.row_dim * dim
    by_list += products * price.visit + (total - by_samples) * (price.product + price.product_dim * dim)
    return "csr" if by_list < by_query else "matrix", _why(by_query, by_list)


def _fewer_steps(x: Tensor, lists: InvertedLists, probed: Tensor, width: int) -> tuple[str, str]:
    """The strategy that launches fewer steps on an accelerator, from sizes that the host knows.

    A step of `matrix` copies as many rows as it may at a time, each for one query; one of `csr` is the product of a
    section of a list with queries that probe it. So if `csr` has no more steps, it reads less, too.
    """
    queries, probes = probed.shape
    gathered = -(-4 * queries * width * x.shape[1] // gathered_bytes(x))
    sections = min(queries * (width // SECTION + probes), lists.packed.shape[0] // SECTION + lists.sizes.shape[0] - 1)
    products = sections + queries * width // PRODUCT_SCORES
    mode = "matrix" if gathered < products else "csr"
    return mode, f"steps: matrix {gathered}, csr at most {products}"


def _why(by_query: float, by_list: float) -> str:
    return f"predicted: matrix {by_query / 1e6:.2f} ms, csr at least {by_list / 1e6:.2f} ms"
