"""Indexes of vectors in fewer bytes: codes of 8 and 4 bits, and fp16 and bf16, which are storage dtypes here."""

from __future__ import annotations

from typing import Any

import torch

from ..index import IndexFlat as FlatModule
from ..index import IndexIVFFlat as IVFFlatModule
from ..index import IndexIVFScalarQuantizer as IVFCodesModule
from ..index import IndexScalarQuantizer as CodesModule
from .arrays import Unsupported
from .base import Index
from .constants import METRIC_L2, ScalarQuantizer, metric_name
from .flat import IndexFlat
from .ivf import IndexIVF

_DTYPES = {ScalarQuantizer.QT_fp16: torch.float16, ScalarQuantizer.QT_bf16: torch.bfloat16}
_BITS = {ScalarQuantizer.QT_8bit: 8, ScalarQuantizer.QT_4bit: 4}


class IndexScalarQuantizer(IndexFlat):
    """Exhaustive search over vectors of 16, 8 or 4 bits an entry. Codes have a range for each vector: no training.

    >>> IndexScalarQuantizer(8, ScalarQuantizer.QT_fp16).sa_code_size()
    16
    """

    def __init__(self, d: int, qtype: int, metric: int = METRIC_L2) -> None:
        Index.__init__(self, _module(qtype, False, d, metric=metric_name(metric)))


class IndexIVFScalarQuantizer(IndexIVF):
    """Inverted file of vectors of 16, 8 or 4 bits an entry; not of their differences from the centroid, whatever
    `by_residual` says."""

    def __init__(
        self,
        quantizer: Index,
        d: int,
        nlist: int,
        qtype: int,
        metric: int = METRIC_L2,
        by_residual: bool = True,
        own_invlists: bool = True,
    ) -> None:
        module = _module(qtype, True, d, nlist=nlist, nprobe=1, metric=metric_name(metric))
        super().__init__(quantizer, module)


def _module(qtype: int, lists: bool, d: int, **settings: Any) -> Any:
    """The index of this library, with inverted lists or without, that stores vectors as one of `ScalarQuantizer`'s
    numbers says."""
    settings["device"] = "cpu"
    if qtype in _DTYPES:
        return (IVFFlatModule if lists else FlatModule)(d, dtype=_DTYPES[qtype], **settings)
    if qtype in _BITS:
        return (IVFCodesModule if lists else CodesModule)(d, bits=_BITS[qtype], **settings)
    names = {number: name for name, number in vars(ScalarQuantizer).items() if name.startswith("QT_")}
    name = names.get(qtype, f"quantizer type {qtype}")
    raise Unsupported(f"faiss_compat has no ScalarQuantizer.{name}; it has QT_8bit, QT_4bit, QT_fp16 and QT_bf16")
