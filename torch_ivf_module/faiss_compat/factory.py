"""Indexes from faiss's factory strings."""

from __future__ import annotations

import re
from collections.abc import Callable

from .arrays import Unsupported
from .base import Index
from .constants import METRIC_L2, ScalarQuantizer
from .flat import IndexFlat, IndexFlatIP, IndexFlatL2
from .id_map import IndexIDMap, IndexIDMap2
from .ivf import IndexIVFFlat
from .pre_transform import IndexPreTransform
from .scalar_quantizer import IndexIVFScalarQuantizer, IndexScalarQuantizer
from .transforms import (
    CenteringTransform,
    NormalizationTransform,
    OPQMatrix,
    PCAMatrix,
    RandomRotationMatrix,
    VectorTransform,
)

SUPPORTED = (
    "Flat, SQ8, SQ4, SQfp16, SQbf16, IVFn before these, L2norm, PCAn, PCARn, PCAWn, RRn, OPQm_n, Center, "
    "IDMap and IDMap2"
)
_QTYPES = {"SQ8": "QT_8bit", "SQ4": "QT_4bit", "SQ6": "QT_6bit", "SQfp16": "QT_fp16", "SQbf16": "QT_bf16"}
# Each from the dimension and the numbers in the string.
_TRANSFORMS: list[tuple[str, Callable[..., VectorTransform]]] = [
    (r"L2[nN]orm", lambda d: NormalizationTransform(d)),
    (r"PCA(\d+)", lambda d, n: PCAMatrix(d, int(n))),
    (r"PCAR(\d+)", lambda d, n: PCAMatrix(d, int(n), 0, True)),
    (r"PCAW(\d+)", lambda d, n: PCAMatrix(d, int(n), -0.5)),
    (r"PCAWR(\d+)", lambda d, n: PCAMatrix(d, int(n), -0.5, True)),
    (r"RR(\d*)", lambda d, n: RandomRotationMatrix(d, int(n or d))),
    (r"OPQ(\d+)", lambda d, m: OPQMatrix(d, int(m))),
    (r"OPQ(\d+)_(\d+)", lambda d, m, n: OPQMatrix(d, int(m), int(n))),
    (r"Center", lambda d: CenteringTransform(d)),
]


def index_factory(d: int, description: str, metric: int = METRIC_L2) -> Index:
    """The index of a factory string, such as "PCA32,IVF100,Flat" or "IDMap,Flat". `Unsupported` for parts not here.

    >>> index_factory(8, "IVF4,Flat").nlist
    4
    >>> index_factory(8, "PCA4,Flat").index.d
    4
    """
    transforms: list[VectorTransform] = []
    maps: list[type[IndexIDMap]] = []
    nlist, encoding = 0, ""
    for word in description.split(","):
        before = transforms[-1].d_out if transforms else d
        if transform := _transform(word, before):
            transforms.append(transform)
        elif word in ("IDMap", "IDMap2"):
            maps.append(IndexIDMap2 if word == "IDMap2" else IndexIDMap)
        elif (found := re.fullmatch(r"IVF(\d+)(?:\(Flat\))?", word)) and not nlist:
            nlist = int(found[1])
        elif (word == "Flat" or word in _QTYPES) and not encoding:
            encoding = word
        else:
            raise Unsupported(f"faiss_compat does not know {word!r} in {description!r}; it knows {SUPPORTED}")
    if not encoding:
        raise Unsupported(f"the factory string {description!r} does not say how vectors are stored, as ',Flat' does")
    index = _plain(transforms[-1].d_out if transforms else d, nlist, encoding, metric)
    if transforms:
        index = IndexPreTransform(*reversed(transforms), index)
    for kind in reversed(maps):
        index = kind(index)
    return index


def _transform(word: str, d: int) -> VectorTransform | None:
    for pattern, make in _TRANSFORMS:
        if found := re.fullmatch(pattern, word):
            return make(d, *found.groups())
    return None


def _plain(d: int, nlist: int, encoding: str, metric: int) -> Index:
    qtype = getattr(ScalarQuantizer, _QTYPES.get(encoding, ""), None)
    if not nlist:
        return IndexFlat(d, metric) if qtype is None else IndexScalarQuantizer(d, qtype, metric)
    quantizer = IndexFlatL2(d) if metric == METRIC_L2 else IndexFlatIP(d)
    if qtype is None:
        return IndexIVFFlat(quantizer, d, nlist, metric)
    return IndexIVFScalarQuantizer(quantizer, d, nlist, qtype, metric)
