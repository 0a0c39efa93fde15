"""faiss's numbers of metrics, direct maps and scalar quantizers."""

from __future__ import annotations

from .arrays import Unsupported

METRIC_INNER_PRODUCT = 0
METRIC_L2 = 1
METRIC_L1 = 2
METRIC_Linf = 3
METRIC_Lp = 4
METRIC_Canberra = 20
METRIC_BrayCurtis = 21
METRIC_JensenShannon = 22
METRIC_Jaccard = 23
METRIC_NaNEuclidean = 24
METRIC_GOWER = 25

_NAMES = {METRIC_INNER_PRODUCT: "ip", METRIC_L2: "l2"}


def metric_name(metric: int) -> str:
    """The name in this library of a metric of faiss. `Unsupported` for any but L2 and inner product."""
    if metric not in _NAMES:
        raise Unsupported(f"faiss_compat has no metric {metric}; METRIC_L2 and METRIC_INNER_PRODUCT are supported")
    return _NAMES[metric]


def metric_number(name: str) -> int:
    """faiss's number of the metric "l2" or "ip"."""
    return METRIC_L2 if name == "l2" else METRIC_INNER_PRODUCT


def is_similarity_metric(metric: int) -> bool:
    """Whether larger values of a metric mean nearer vectors."""
    return metric in (METRIC_INNER_PRODUCT, METRIC_Jaccard)


class DirectMap:
    """The kind of map from ids to rows. Ids are always found here, so it changes nothing."""

    NoMap, Array, Hashtable = 0, 1, 2

    def __init__(self) -> None:
        self.type = self.NoMap


class ScalarQuantizer:
    """faiss's numbers of the codes of a scalar quantizer."""

    QT_8bit, QT_4bit, QT_8bit_uniform, QT_4bit_uniform, QT_fp16, QT_8bit_direct, QT_6bit, QT_bf16 = range(8)
    QT_8bit_direct_signed = 8
