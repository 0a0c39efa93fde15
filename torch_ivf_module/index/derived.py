"""Tensors that a search needs and that are computed from the buffers; they are never saved.

N packed rows, L lists, d dim.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from ..functional import metric as metrics
from ..functional.kernels import kernel_for
from ..functional.lists import InvertedLists, inverted_lists, sampled_lists
from ..functional.probe import Coarse, coarse_of
from ..functional.row_codes import as_float
from .eager import without_autocast

_CODED_VALUES = 1 << 14  # numbers (L * d) of centroids from which on they are coded


class Derived(NamedTuple):
    """The coarse quantizer and the inverted lists of some buffers."""

    coarse: Coarse
    lists: InvertedLists

    @property
    def bytes(self) -> int:
        """Memory of the tensors that are not buffers."""
        return self.coarse.bytes + self.lists.sizes.nbytes + self.lists.bias.nbytes


def derive(buffers: Mapping[str, Tensor], names: tuple[str, ...], metric: str) -> Derived:
    """`Derived` of the buffers of a trained index; `names` are those of centroids, packed rows, offsets and ids."""
    centroids, packed, offsets, ids = (buffers[name] for name in names)
    with torch.no_grad(), without_autocast(packed.device):
        coarse = coarse_quantizer(centroids, packed, offsets, metric)
        bias = metrics.row_bias(packed, coarse.origin, metric)
        return Derived(coarse, inverted_lists(packed, offsets, ids, bias))


def with_centroids(derived: Derived, centroids: Tensor, metric: str) -> Derived:
    """`Derived` of the same lists with other centroids (L, d). The origin stays, and so what is relative to it."""
    with torch.no_grad(), without_autocast(centroids.device):
        return derived._replace(coarse=_with_codes(coarse_of(centroids, metric, derived.coarse.origin)))


def coarse_quantizer(centroids: Tensor, packed: Tensor, offsets: Tensor, metric: str) -> Coarse:
    """The coarse quantizer of centroids (L, d); of a flat index, which has none, that of one list.

    Its origin is the median of a sample of the centroids, weighted by the rows of their lists, since centroids of empty
    lists may be far away; of a flat index the median of a sample of the rows (N, ...).
    """
    if not centroids.shape[0]:
        sample = packed[:: metrics.origin_step(packed.shape[0])]
        origin = metrics.origin_of(as_float(sample, centroids.shape[1]), metric)
        return coarse_of(origin[None], metric, origin)
    filled = sampled_lists(offsets, packed.shape[0])
    origin = metrics.origin_of(centroids[filled] if filled.shape[0] else centroids, metric)
    return _with_codes(coarse_of(centroids, metric, origin))


def _with_codes(coarse: Coarse) -> Coarse:
    """With codes of the centroids, where a kernel finds the nearest ones faster by them."""
    centroids, (count, d) = coarse.centroids, coarse.centroids.shape
    kernel = kernel_for(centroids)
    if kernel is None or centroids.numel() < _CODED_VALUES or not kernel.serves(centroids):
        return coarse
    if not kernel.multiplies_codes():
        return coarse
    offsets = torch.tensor([0, count], device=centroids.device)
    one_list = inverted_lists(centroids, offsets, torch.arange(count, device=centroids.device), coarse.bias)
    return coarse._replace(codes=kernel.encode(one_list, d))
