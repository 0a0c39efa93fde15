"""faiss indexes as ours: the vectors, lists and ids, nothing trained again. `faiss_export` has the other direction.

N vectors, L lists, d dim.
"""

from __future__ import annotations

import itertools
import os
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ._optional import require
from .faiss_codes import CPU, Unsupported, rows_of, storage
from .faiss_export import to_faiss
from .functional.lists import pack
from .functional.probe import coarse_of, nearest_lists
from .index import (
    IndexFlat,
    IndexFlatIP,
    IndexFlatL2,
    IndexIVFFlat,
    IndexIVFScalarQuantizer,
    IndexPreTransform,
    IndexScalarQuantizer,
)
from .index.base import IndexBase
from .index.pre_transform import Normalize

__all__ = ["from_faiss", "is_file", "read", "to_faiss"]

WORKS = (
    "IndexFlat (L2, IP), IndexScalarQuantizer, IndexIVFFlat, IndexIVFScalarQuantizer, "
    "and IndexIDMap, IndexIDMap2 and IndexPreTransform around them"
)


def from_faiss(index: Any, *, codes: bool = True) -> IndexBase | IndexPreTransform:
    """Convert a faiss index, with its vectors, lists and ids. Nothing is trained again.

    Parameters
    ----------
    index : a faiss index. float16 and bfloat16 vectors keep their dtype. Linear transforms (PCA, OPQ,
        rotations, centring, remapped dimensions) become `nn.Linear`; L2 normalisation before an inner product becomes
        metric "cosine".
    codes : whether codes of 8, 6 or 4 bits become codes of 8, 8 or 4 bits here. False decodes them to float32: the same
        results as faiss, in four times the memory. Codes of QT_8bit_uniform, QT_4bit_uniform and QT_8bit_direct are
        kept, up to float32 rounding, unless they are codes of residuals. Other codes have a range for each dimension,
        but `IndexScalarQuantizer` has one for each vector. So they are decoded and encoded again, which changes an
        entry by at most 1/510 (8 bits) or 1/30 (4 bits) of the range of its vector.

    Vectors are copied to the CPU. A direct map, or a graph over the centroids, is ignored. If the coarse quantizer is
    an IndexFlat, the lists are kept. Other quantizers are approximate, so each vector is moved to its nearest list.
    `add` continues from the largest id. Raises TypeError for an unsupported index, ValueError if a vector is not
    finite, ImportError without faiss (extra `faiss`).

    >>> import faiss
    >>> theirs = faiss.IndexFlatL2(2)
    >>> theirs.add(torch.eye(2).numpy())
    >>> from_faiss(theirs).search(torch.eye(2)[1:], 1)[1]
    tensor([[1]])
    """
    faiss = require("faiss", "faiss")
    if not isinstance(index, faiss.Index):
        raise Unsupported(f"index must be a faiss index, got {type(index).__name__}")
    return _converted(faiss, index, None, codes)


def _converted(faiss: Any, index: Any, ids: Tensor | None, codes: bool) -> IndexBase | IndexPreTransform:
    """`index` as ours; `ids` (N,) are the labels of what it takes for ids 0 .. N - 1, from a map around it."""
    index = faiss.downcast_index(index)
    if isinstance(index, faiss.IndexIDMap):  # and IndexIDMap2
        labels = torch.from_numpy(faiss.vector_to_array(index.id_map))
        return _converted(faiss, index.index, labels if ids is None else ids[labels], codes)
    if isinstance(index, faiss.IndexPreTransform):
        return _behind_transforms(faiss, index, _converted(faiss, index.index, ids, codes))
    # Exactly these, as in _is_flat.
    if type(index) in (faiss.IndexIVFFlat, faiss.IndexIVFScalarQuantizer):
        return _ivf(faiss, index, ids, codes)
    if _is_flat(faiss, index) or type(index) is faiss.IndexScalarQuantizer:
        return _flat(faiss, index, ids, codes)
    raise Unsupported(f"faiss's {type(index).__name__} is not supported; supported are {WORKS}")


def _metric(faiss: Any, index: Any) -> str:
    names = {faiss.METRIC_L2: "l2", faiss.METRIC_INNER_PRODUCT: "ip"}
    if index.metric_type not in names:
        raise Unsupported(f"index has faiss's metric {index.metric_type}; supported are L2 and inner product")
    return names[index.metric_type]


def _flat(faiss: Any, index: Any, ids: Tensor | None, codes: bool) -> IndexBase:
    metric = _metric(faiss, index)
    quantizer, settings = storage(faiss, index, codes)
    if "bits" in settings:
        ours: IndexBase = IndexScalarQuantizer(index.d, metric=metric, device=CPU, **settings)
    else:
        ours = (IndexFlatL2 if metric == "l2" else IndexFlatIP)(index.d, device=CPU, **settings)
    stored = faiss.vector_to_array(index.codes).reshape(index.ntotal, index.sa_code_size())
    rows = rows_of(faiss, index, quantizer, ours, stored)
    labels = torch.arange(rows.shape[0], device=CPU) if ids is None else ids
    offsets = torch.tensor([0, rows.shape[0]], device=CPU)
    _load(ours, torch.empty(0, index.d, dtype=torch.float32, device=CPU), rows, offsets, labels)
    return ours


def _ivf(faiss: Any, index: Any, ids: Tensor | None, codes: bool) -> IndexBase:
    metric = _metric(faiss, index)
    if index.quantizer.metric_type != index.metric_type:
        raise Unsupported("the quantizer of index has another metric than the index, which is not supported")
    quantizer, settings = storage(faiss, index, codes)
    settings |= dict(nlist=index.nlist, nprobe=index.nprobe, max_codes=index.max_codes)
    kind = IndexIVFScalarQuantizer if "bits" in settings else IndexIVFFlat
    ours: IndexBase = kind(index.d, metric=metric, device=CPU, **settings)
    if not index.is_trained:
        return ours
    coarse = faiss.downcast_index(index.quantizer)
    centroids = torch.from_numpy(_plain(coarse.reconstruct_n(0, index.nlist)))
    rows, offsets, labels = _lists(faiss, index, quantizer, ours, centroids)
    if ids is not None:
        if labels.shape[0] and not 0 <= int(labels.min()) <= int(labels.max()) < ids.shape[0]:
            raise ValueError("index has fewer ids than vectors, as IndexIDMap over IVF has after remove_ids")
        labels = ids[labels]
    if not _is_flat(faiss, coarse):
        nearest = nearest_lists(rows, coarse_of(centroids, metric), metric)
        rows, offsets, labels = pack(rows, labels, nearest, index.nlist)
    _load(ours, centroids, rows, offsets, labels)
    return ours


def _is_flat(faiss: Any, index: Any) -> bool:
    """Whether it is exactly a flat index, not of a class made of one, which may lay its vectors out in another way."""
    return type(index) in (faiss.IndexFlat, faiss.IndexFlatL2, faiss.IndexFlatIP)


def _load(ours: IndexBase, centroids: Tensor, rows: Tensor, offsets: Tensor, ids: Tensor) -> None:
    state = {"centroids": centroids, ours.store.format.name: rows, "list_offsets": offsets, "list_ids": ids}
    try:
        ours.load_state_dict(state)
    except (RuntimeError, ValueError) as error:
        raise ValueError(f"index cannot be converted: {error}") from error


def _lists(
    faiss: Any, index: Any, quantizer: str | None, ours: IndexBase, centroids: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """The inverted lists of a faiss index: rows as `ours` stores them, offsets and ids."""
    tools = require("faiss.contrib.inspect_tools", "faiss")
    sizes = [index.invlists.list_size(number) for number in range(index.nlist)]
    offsets = torch.tensor([0, *itertools.accumulate(sizes)], device=CPU)
    like = ours.store.packed
    packed = torch.empty(sum(sizes), like.shape[1], dtype=like.dtype, device=CPU)
    ids = torch.empty(sum(sizes), dtype=torch.int64, device=CPU)
    for number, (start, end) in enumerate(itertools.pairwise(offsets.tolist())):
        if end > start:
            labels, codes = tools.get_invlist(index.invlists, number)
            packed[start:end] = rows_of(faiss, index, quantizer, ours, codes, centroids[number])
            ids[start:end] = torch.from_numpy(labels)
    return packed, offsets, ids


def _plain(array: Any) -> Any:
    """An array, whether or not faiss.contrib.torch_utils has made faiss's methods return tensors."""
    return array.numpy() if isinstance(array, Tensor) else array


# -- transforms ----------------------------------------------------------------------------------------------


def _behind_transforms(faiss: Any, outer: Any, inner: IndexBase | IndexPreTransform) -> IndexBase | IndexPreTransform:
    steps = [_step(faiss, outer.chain.at(number)) for number in range(outer.chain.size())]
    if isinstance(inner, IndexPreTransform):
        steps, inner = [*steps, *inner.steps()], inner.index
    if not steps:
        return inner
    if len(steps) == 1 and isinstance(steps[0], Normalize) and inner.metric == "ip":
        return _as_cosine(inner)
    return IndexPreTransform(outer.d, nn.Sequential(*steps).requires_grad_(False), inner)


def _step(faiss: Any, transform: Any) -> nn.Linear | Normalize:
    """One vector transform of faiss as a module."""
    transform = faiss.downcast_VectorTransform(transform)
    if not transform.is_trained:
        raise Unsupported(f"the {type(transform).__name__} before the index is not trained")
    if isinstance(transform, faiss.NormalizationTransform) and transform.norm == 2:
        return Normalize()
    d, out = transform.d_in, transform.d_out
    matrix, bias = np.eye(out, d, dtype=np.float32), np.zeros(out, dtype=np.float32)
    if isinstance(transform, faiss.LinearTransform):
        matrix = faiss.vector_to_array(transform.A).reshape(out, d)
        bias = faiss.vector_to_array(transform.b) if transform.have_bias else bias
    elif isinstance(transform, faiss.CenteringTransform):
        bias = -faiss.vector_to_array(transform.mean)
    elif isinstance(transform, faiss.RemapDimensionsTransform):
        matrix = np.ascontiguousarray(_plain(transform.apply(np.eye(d, dtype=np.float32))).T)
    else:
        raise Unsupported(
            f"faiss's {type(transform).__name__} is not supported; supported are linear transforms, "
            "CenteringTransform, RemapDimensionsTransform and NormalizationTransform by the L2 norm"
        )
    layer = nn.Linear(d, out, device=CPU, dtype=torch.float32)
    layer.load_state_dict({"weight": torch.from_numpy(matrix), "bias": torch.from_numpy(bias)})
    return layer


def _as_cosine(inner: IndexBase) -> IndexBase:
    """The index by inner product whose vectors and queries were normalised, as one by cosine."""
    config = {**inner.config(), "metric": "cosine", "dtype": inner.dtype, "device": inner.device}
    ours: IndexBase = IndexFlat(**config) if isinstance(inner, IndexFlat) else type(inner)(**config)
    ours.load_state_dict(inner.state_dict(), assign=True)
    return ours


# -- files ---------------------------------------------------------------------------------------------------


def is_file(path: str | os.PathLike[str]) -> bool:
    """Whether a file begins as those of `faiss.write_index` do: with the four letters of a kind of index."""
    with Path(path).open("rb") as file:
        mark = file.read(4)
    return len(mark) == 4 and mark[:1] == b"I" and mark.isalnum()


def read(path: str | os.PathLike[str]) -> IndexBase | IndexPreTransform:
    """The index in a file of `faiss.write_index`. Raises as `from_faiss`, RuntimeError for a damaged file."""
    faiss = require("faiss", "faiss")
    return from_faiss(faiss.read_index(os.fspath(path)))
