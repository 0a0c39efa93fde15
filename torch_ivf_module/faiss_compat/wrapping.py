"""Indexes of this library as indexes with faiss's methods."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from ..checkpoint import rebuilt
from ..index import IndexFlat as FlatModule
from ..index import IndexIVFFlat as IVFFlatModule
from ..index import IndexPreTransform as PreTransformModule
from ..index.base import IndexBase
from .arrays import Unsupported
from .base import Index
from .constants import METRIC_INNER_PRODUCT, METRIC_L2, metric_number
from .flat import IndexFlat, IndexFlatIP, IndexFlatL2
from .id_map import IndexIDMap, IndexIDMap2
from .ivf import IndexIVF, IndexIVFFlat
from .pre_transform import IndexPreTransform
from .scalar_quantizer import IndexIVFScalarQuantizer, IndexScalarQuantizer
from .transforms import LinearTransform, NormalizationTransform, VectorTransform

_MAPS: dict[str, type[IndexIDMap]] = {"IndexIDMap": IndexIDMap, "IndexIDMap2": IndexIDMap2}
_FLATS = {"IndexFlatL2": METRIC_L2, "IndexFlatIP": METRIC_INNER_PRODUCT}


def wrap(module: Any, classes: Sequence[str] = ()) -> Index:
    """Wrap an index of this library in an index with the methods of faiss. Vectors are shared, not copied.

    A flat index with ids other than 0 .. N - 1 is wrapped in an IndexIDMap2. An index with metric "cosine" becomes an
    inner-product index behind a NormalizationTransform. `classes` are names from `class_names`, for an index that was
    wrapped before.

    >>> wrap(FlatModule(4, "ip"))
    faiss_compat.IndexFlatIP(4, ntotal=0)
    """
    if classes and classes[0] in _MAPS:
        return _MAPS[classes[0]].around(wrap(module, classes[1:]))
    if isinstance(module, PreTransformModule):
        d, transforms = module.d, []
        for step in module.steps():
            transforms.append(_transform(step, d))
            d = transforms[-1].d_out
        return IndexPreTransform(*reversed(transforms), wrap(module.index, classes[1:]))
    if not isinstance(module, IndexBase):
        raise Unsupported(f"faiss_compat has no counterpart of {type(module).__name__}")
    if module.metric == "cosine":
        return IndexPreTransform(NormalizationTransform(module.d), wrap(_by_product(module), classes))
    if not module.store.flat:
        return _ivf(module, _FLATS.get(classes[-1] if classes else "", metric_number(module.metric)))
    ids = module.store.packed_lists()[2]
    numbered = torch.equal(ids, torch.arange(ids.shape[0], device=ids.device))
    return _flat(module) if numbered or classes else IndexIDMap2.around(_flat(module))


def class_names(index: Any) -> list[str]:
    """The names of the classes of an index, of those within it, and of a quantizer of another metric."""
    inner = class_names(index.index) if isinstance(index, (IndexIDMap, IndexPreTransform)) else []
    if isinstance(index, IndexIVF) and index.quantizer.metric_type != index.metric_type:
        inner = [type(_flat(index.quantizer.module)).__name__]
    return [type(index).__name__, *inner]


def _flat(module: IndexBase) -> Index:
    if not (isinstance(module, FlatModule) and module.dtype == torch.float32):
        return IndexScalarQuantizer.of(module)
    return (IndexFlatL2 if module.metric == "l2" else IndexFlatIP).of(module)


def _ivf(module: Any, metric: int) -> Index:
    quantizer = IndexFlat(module.d, metric)
    quantizer.module.to(module.device)
    quantizer.put(module.centroids, None)
    plain = isinstance(module, IVFFlatModule) and module.dtype == torch.float32
    return (IndexIVFFlat if plain else IndexIVFScalarQuantizer).around(quantizer, module)


def _by_product(module: IndexBase) -> IndexBase:
    """An index by cosine as one by inner product of the same vectors, which have unit length."""
    found = rebuilt({"class": type(module).__name__, "config": {**module.config(), "metric": "ip"}})
    assert isinstance(found, IndexBase)
    found.load_state_dict(module.state_dict(), assign=True)
    return found


def _transform(step: nn.Module, d: int) -> VectorTransform:
    if not isinstance(step, nn.Linear):
        return NormalizationTransform(d)
    transform = LinearTransform(step.in_features, step.out_features, step.bias is not None)
    transform.set(step.weight.detach().cpu(), None if step.bias is None else step.bias.detach().cpu())
    return transform
