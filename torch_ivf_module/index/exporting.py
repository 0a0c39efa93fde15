"""The search of an index in a model that torch.export records: one operator, whose inputs are the buffers.

Where such a program runs, the library of the kernel has to be loaded. Q queries, d dim, k results.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .. import native
from .._torch_internals import outside_of_modes
from ..functional import metric as metrics
from ..functional.kernels import KERNELS
from ..functional.row_codes import vectors_of
from ..functional.search import candidate_count
from ..functional.transforms import scored
from ..params import SearchParams
from .derived import derive
from .eager import refuse_recording
from .grouping import by_group

if TYPE_CHECKING:
    from .base import IndexBase


def exported_search(
    index: IndexBase, x: Tensor, k: int, params: SearchParams | None, *, with_vectors: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """What torch.export records of a search of x (Q, d): D and I (Q, k), and the vectors (Q, k, d) `with_vectors`.

    RuntimeError for an untrained index, and for what the operator does not do: rows that the kernel does not serve,
    other devices than the CPU, budgets, selectors, exclusions, groups, profile="exact".
    """
    options, store = index.search_options(k, params), index.store
    store.require_trained("search")
    served = native.available() and any(kernel.serves(store.packed) for kernel in KERNELS)
    served &= store.device.type == "cpu" and not torch.onnx.is_in_onnx_export()
    plain = options.mode == "auto" and options.budget is None and not options.exact
    filtered = params is not None and (params.selector is not None or params.exclude is not None or by_group(params))
    if not served or not plain or filtered:
        refuse_recording("search")
    if x.dim() != 2 or x.shape[1] != index.d:
        raise ValueError(f"x must have shape (n, {index.d}), got {tuple(x.shape)}")
    if not store.handed_out:
        raise RuntimeError("torch.export did not record the buffers of the index: export a module that contains it")
    # torch.export has read the buffers, and has then replaced them by tensors without values.
    with outside_of_modes():
        derived = derive(store.handed_out, store.names, store.metric)
    buffers = store.buffers
    centroids = derived.coarse.centroids if store.flat else buffers["centroids"]
    packed, ids = store.packed, buffers["list_ids"]
    with torch.autocast(x.device.type, enabled=False):
        queries = metrics.prepare(x.float(), index.metric)
        scores, rows, found, *_ = torch.ops.torch_ivf_module.search_index(
            queries.detach(),
            [centroids, derived.coarse.bias, derived.coarse.origin],
            [packed, buffers["list_offsets"], ids, derived.lists.sizes, derived.lists.bias],
            None,  # an exported program has no codes: they would be a second copy of the rows in it
            None,
            None,
            k,
            candidate_count(k),
            options.nprobe,
            options.max_codes or 0,
            metrics.by_differences(index.metric),
            options.max_bytes,
        )
        differentiate = x.requires_grad and torch.is_grad_enabled()
        vectors = packed[:0]
        if with_vectors or differentiate:
            vectors = vectors_of(packed[rows.clamp(min=0)], store.d).masked_fill((rows < 0)[..., None], torch.nan)
        if differentiate:
            scores, found, vectors = scored(queries, found, vectors, index.metric)
        return metrics.to_distance(scores, index.metric), found, vectors
