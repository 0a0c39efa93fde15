"""Our indexes as faiss's: the vectors, lists and ids, nothing trained again. `faiss_bridge` has the other direction.

N vectors, L lists, d dim.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ._optional import require
from .faiss_codes import ROWS, codes_of, kind_of, train
from .functional.lists import lengths
from .index import IndexIVF, IndexPreTransform
from .index.base import IndexBase
from .index.pre_transform import Normalize

__all__ = ["to_faiss"]

def to_faiss(index: IndexBase | IndexPreTransform) -> Any:
    """Convert `index` to a faiss index, with its vectors, lists and ids. Nothing is trained again.

    - float32 vectors become an IndexFlat or IndexIVFFlat.
    - float16 and bfloat16 vectors become an IndexScalarQuantizer or IndexIVFScalarQuantizer with the same values.
    - Codes of 8 or 4 bits become these classes with QT_8bit or QT_4bit. faiss has a range for each dimension instead of
      each vector, so they are decoded and encoded again, which changes an entry by at most 1/510 (8 bits) or 1/30
      (4 bits) of the range of its dimension. Without vectors, the faiss index is not trained.
    - A flat index with ids other than 0 .. N - 1 becomes an IndexIDMap2.
    - Metric "cosine" and `IndexPreTransform` become transforms of faiss, so queries are passed unchanged.

    Vectors are copied. faiss's `add` numbers from `ntotal`: if ids have gaps, use `add_with_ids` there. Raises
    TypeError if a transform does not consist of `nn.Linear` and `Normalize`, ImportError without faiss.

    >>> from torch_ivf_module import IndexFlatIP
    >>> index = IndexFlatIP(2)
    >>> index.add(torch.eye(2))
    >>> to_faiss(index).search(torch.eye(2)[1:].numpy(), 1)[1]
    array([[1]])
    """
    faiss = require("faiss", "faiss")
    if isinstance(index, IndexPreTransform):
        inner, steps = to_faiss(index.index), index.steps()
    elif isinstance(index, IndexBase):
        index.check_buffers()
        inner = _flat_to(faiss, index) if index.store.flat else _ivf_to(faiss, index)
        steps = [Normalize()] if index.metric == "cosine" else []
    else:
        raise TypeError(f"index must be an index of torch_ivf_module, got {type(index).__name__}")
    for step in reversed(steps):
        d = step.in_features if isinstance(step, nn.Linear) else inner.d
        inner = faiss.IndexPreTransform(_step_to(faiss, step, d), inner)
    return inner


def _measure(faiss: Any, index: IndexBase) -> Any:
    return faiss.METRIC_L2 if index.metric == "l2" else faiss.METRIC_INNER_PRODUCT


def _flat_to(faiss: Any, index: IndexBase) -> Any:
    packed, ids, kind = index.store.packed_lists()[0].cpu(), index.list_ids.cpu(), kind_of(faiss, index)
    if kind is None:
        theirs = faiss.IndexFlat(index.d, _measure(faiss, index))
    else:
        theirs = faiss.IndexScalarQuantizer(index.d, kind, _measure(faiss, index))
    if not packed.is_floating_point():
        train(faiss, theirs, packed)
    plain = torch.equal(ids, torch.arange(ids.shape[0], device="cpu"))
    labelled = None if plain else faiss.IndexIDMap2(theirs)  # which it takes only while it is empty
    for chunk in packed.split(ROWS):
        if chunk.shape[0]:
            theirs.add_sa_codes(codes_of(theirs, chunk))
    if labelled is None:
        return theirs
    faiss.copy_array_to_vector(ids.numpy(), labelled.id_map)
    labelled.ntotal = theirs.ntotal
    labelled.construct_rev_map()  # of so many ids
    return labelled


def _ivf_to(faiss: Any, index: IndexBase) -> Any:
    assert isinstance(index, IndexIVF)
    measure, kind = _measure(faiss, index), kind_of(faiss, index)
    quantizer = faiss.IndexFlat(index.d, measure)
    if kind is None:
        theirs = faiss.IndexIVFFlat(quantizer, index.d, index.nlist, measure)
    else:
        theirs = faiss.IndexIVFScalarQuantizer(quantizer, index.d, index.nlist, kind, measure, False)
    theirs.nprobe, theirs.max_codes = min(index.nprobe, index.nlist), index.max_codes or 0
    packed, ids = index.store.packed_lists()[0].cpu(), index.list_ids.cpu()
    coded = not packed.is_floating_point()
    if coded:
        train(faiss, theirs, packed)
    theirs.is_trained = index.is_trained and not (coded and not index.ntotal)
    if index.is_trained:
        quantizer.add(index.centroids.cpu().numpy())
        start = 0
        for number, size in enumerate(lengths(index.list_offsets).tolist()):
            if size:
                codes, labels = codes_of(theirs, packed[start : start + size]), ids[start : start + size].numpy()
                theirs.invlists.add_entries(number, size, faiss.swig_ptr(labels), faiss.swig_ptr(codes))
            start += size
        theirs.ntotal = index.ntotal
    return theirs


def _step_to(faiss: Any, step: nn.Linear | Normalize, d: int) -> Any:
    if isinstance(step, Normalize):
        return faiss.NormalizationTransform(d, 2.0)
    transform = faiss.LinearTransform(step.in_features, step.out_features, step.bias is not None)
    faiss.copy_array_to_vector(step.weight.detach().float().cpu().numpy().ravel(), transform.A)
    if step.bias is not None:
        faiss.copy_array_to_vector(step.bias.detach().float().cpu().numpy(), transform.b)
    transform.is_trained = True
    return transform
