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

from ._arrays import finite
from ._optional import require
from .faiss_export import to_faiss
from .index import IndexFlat, IndexFlatIP, IndexFlatL2, IndexIVFFlat, IndexPreTransform
from .index.base import IndexBase
from .index.pre_transform import Normalize

__all__ = ["from_faiss", "is_file", "read", "to_faiss"]

WORKS = (
    "IndexFlat (L2, IP), IndexScalarQuantizer, IndexIVFFlat, IndexIVFScalarQuantizer, "
    "and IndexIDMap, IndexIDMap2 and IndexPreTransform around them"
)


# The scalar quantizers whose decoded vectors are what faiss computes distances to.
QUANTIZERS = (
    "QT_8bit",
    "QT_4bit",
    "QT_6bit",
    "QT_8bit_uniform",
    "QT_4bit_uniform",
    "QT_8bit_direct",
    "QT_8bit_direct_signed",
    "QT_fp16",
    "QT_bf16",
)


CPU = torch.device("cpu")  # where faiss's vectors go, whatever the default device


class Unsupported(TypeError):
    """No counterpart here; the text says what works."""


def from_faiss(index: Any) -> IndexBase | IndexPreTransform:
    """The index that answers as a faiss index does, with the same ids.

    Parameters
    ----------
    index : one of WORKS. Vectors behind a scalar quantizer are decoded: to float16 or bfloat16 where that is how faiss
        holds them, to float32 otherwise. Linear transforms (PCA, OPQ, rotations, centring, remapped dimensions) become
        `nn.Linear`; L2 normalisation before an inner product becomes metric "cosine".

    Vectors are copied, to the CPU. What only speeds faiss up (a direct map, a graph over the centroids) is left behind.
    Lists are taken over as they are where the coarse quantizer is an IndexFlat. Any other is approximate and may have
    put vectors into lists that are not the nearest: each vector is moved to its nearest list.
    `add` numbers on from the largest id. Raises TypeError for an index that has no counterpart, ValueError for one
    whose vectors are not finite, ImportError without faiss (extra `faiss`).

    >>> import faiss
    >>> theirs = faiss.IndexFlatL2(2)
    >>> theirs.add(torch.eye(2).numpy())
    >>> from_faiss(theirs).search(torch.eye(2)[1:], 1)[1]
    tensor([[1]])
    """
    faiss = require("faiss", "faiss")
    if not isinstance(index, faiss.Index):
        raise Unsupported(f"index must be a faiss index, got {type(index).__name__}")
    return _converted(faiss, index, None)


def _converted(faiss: Any, index: Any, ids: Tensor | None) -> IndexBase | IndexPreTransform:
    """`index` as ours; `ids` (N,) are the labels of what it takes for ids 0 .. N - 1, from a map around it."""
    index = faiss.downcast_index(index)
    if isinstance(index, faiss.IndexIDMap):  # and IndexIDMap2
        labels = torch.from_numpy(faiss.vector_to_array(index.id_map))
        return _converted(faiss, index.index, labels if ids is None else ids[labels])
    if isinstance(index, faiss.IndexPreTransform):
        return _behind_transforms(faiss, index, _converted(faiss, index.index, ids))
    # Exactly these, as in _is_flat.
    if type(index) in (faiss.IndexIVFFlat, faiss.IndexIVFScalarQuantizer):
        return _ivf(faiss, index, ids)
    if _is_flat(faiss, index) or type(index) is faiss.IndexScalarQuantizer:
        return _flat(faiss, index, ids)
    raise Unsupported(f"faiss's {type(index).__name__} has no counterpart here; these do: {WORKS}")


def _metric(faiss: Any, index: Any) -> str:
    names = {faiss.METRIC_L2: "l2", faiss.METRIC_INNER_PRODUCT: "ip"}
    if index.metric_type not in names:
        raise Unsupported(f"index has faiss's metric number {index.metric_type}; l2 and inner product work")
    return names[index.metric_type]


def _flat(faiss: Any, index: Any, ids: Tensor | None) -> IndexBase:
    metric = _metric(faiss, index)
    dtype, decode = _codec(faiss, index)
    codes = faiss.vector_to_array(index.codes).reshape(index.ntotal, index.sa_code_size())
    ours = (IndexFlatL2 if metric == "l2" else IndexFlatIP)(index.d, dtype=dtype, device=CPU)
    rows = decode(codes)
    ours.add_with_ids(rows, torch.arange(rows.shape[0], device=CPU) if ids is None else ids)
    return ours


def _ivf(faiss: Any, index: Any, ids: Tensor | None) -> IndexBase:
    metric = _metric(faiss, index)
    if index.quantizer.metric_type != index.metric_type:
        raise Unsupported("index chooses lists by another metric than it ranks by; here the two are the same")
    dtype, decode = _codec(faiss, index)
    settings = dict(nlist=index.nlist, nprobe=index.nprobe, max_codes=index.max_codes)
    ours = IndexIVFFlat(index.d, metric=metric, dtype=dtype, device=CPU, **settings)
    if not index.is_trained:
        return ours
    quantizer = faiss.downcast_index(index.quantizer)
    centroids = torch.from_numpy(_plain(quantizer.reconstruct_n(0, index.nlist)))
    rows, offsets, labels = _lists(faiss, index, centroids, decode, dtype)
    finite(rows, "index")
    if ids is not None:
        if labels.shape[0] and not 0 <= int(labels.min()) <= int(labels.max()) < ids.shape[0]:
            raise ValueError("index maps fewer ids than it holds, as IndexIDMap does over an IVF after remove_ids")
        labels = ids[labels]
    try:
        if _is_flat(faiss, quantizer):
            _load(ours, centroids, rows, offsets, labels)
        else:
            _load(ours, centroids, rows[:0], torch.zeros_like(offsets), labels[:0])
            ours.add_with_ids(rows, labels)
    except (RuntimeError, ValueError) as error:
        raise ValueError(f"index cannot be taken over: {error}") from error
    return ours


def _is_flat(faiss: Any, index: Any) -> bool:
    """Whether it is exactly a flat index, not of a class made of one, which may lay its vectors out in another way."""
    return type(index) in (faiss.IndexFlat, faiss.IndexFlatL2, faiss.IndexFlatIP)


def _load(ours: IndexIVFFlat, centroids: Tensor, rows: Tensor, offsets: Tensor, ids: Tensor) -> None:
    ours.load_state_dict({"centroids": centroids, "packed_embeddings": rows, "list_offsets": offsets, "list_ids": ids})


def _lists(faiss: Any, index: Any, centroids: Tensor, decode: Any, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """The inverted lists of a faiss index: vectors, offsets and ids."""
    tools = require("faiss.contrib.inspect_tools", "faiss")
    sizes = [index.invlists.list_size(number) for number in range(index.nlist)]
    offsets = torch.tensor([0, *itertools.accumulate(sizes)], device=CPU)
    packed = torch.empty(sum(sizes), index.d, dtype=dtype, device=CPU)
    ids = torch.empty(sum(sizes), dtype=torch.int64, device=CPU)
    for number, (start, end) in enumerate(itertools.pairwise(offsets.tolist())):
        if end > start:
            labels, codes = tools.get_invlist(index.invlists, number)
            rows = decode(codes)
            packed[start:end] = rows + centroids[number] if _by_residual(faiss, index) else rows
            ids[start:end] = torch.from_numpy(labels)
    return packed, offsets, ids


def _by_residual(faiss: Any, index: Any) -> bool:
    """Whether the codes of an inverted file are those of differences from the centroid."""
    return isinstance(index, faiss.IndexIVFScalarQuantizer) and bool(index.by_residual)


def _codec(faiss: Any, index: Any) -> tuple[torch.dtype, Any]:
    """The dtype to store decoded vectors in, and the function from codes (n, bytes) to vectors (n, d)."""
    sq = getattr(index, "sq", None)
    if sq is None:
        return torch.float32, lambda codes: torch.from_numpy(codes.view(np.float32))
    names = {getattr(faiss.ScalarQuantizer, name, None): name for name in QUANTIZERS}
    if sq.qtype not in names:
        known = ", ".join(QUANTIZERS)
        raise Unsupported(f"index has faiss's scalar quantizer {sq.qtype}, which is not decoded here: {known} are")
    halves = {faiss.ScalarQuantizer.QT_fp16: torch.float16, faiss.ScalarQuantizer.QT_bf16: torch.bfloat16}
    dtype = torch.float32 if _by_residual(faiss, index) else halves.get(sq.qtype, torch.float32)
    return dtype, lambda codes: torch.from_numpy(sq.decode(np.ascontiguousarray(codes)))


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
            f"faiss's {type(transform).__name__} has no counterpart here; these do: linear transforms, "
            "CenteringTransform, RemapDimensionsTransform and NormalizationTransform by the L2 norm"
        )
    layer = nn.Linear(d, out, device=CPU, dtype=torch.float32)
    layer.load_state_dict({"weight": torch.from_numpy(matrix), "bias": torch.from_numpy(bias)})
    return layer


def _as_cosine(inner: IndexBase) -> IndexBase:
    """The index by inner product whose vectors and queries were normalised, as one by cosine."""
    config = {**inner.config(), "metric": "cosine", "dtype": inner.dtype, "device": inner.device}
    ours = IndexFlat(**config) if isinstance(inner, IndexFlat) else IndexIVFFlat(**config)
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
