"""One small adapter a library: build, set its parameters, search. A variant is an adapter with fixed attributes."""

from .contract import Engine, Spec
from .registry import FLAT, GRAPH, IVF, LIBRARIES, Entry, Variant, make, missing, owners, paired, settle_native

__all__ = [
    "FLAT",
    "GRAPH",
    "IVF",
    "LIBRARIES",
    "Engine",
    "Entry",
    "Spec",
    "Variant",
    "make",
    "missing",
    "owners",
    "paired",
    "settle_native",
]
