"""The engines by the names they have in the tables. Variants of one adapter share one index."""

from __future__ import annotations

import importlib
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from .contract import Engine, Spec
from .of_faiss import FaissFlat, FaissIVF
from .others import Hnswlib, Sklearn, Usearch
from .ours import OursFlat, OursInTorch, OursIVF
from .torch_peers import TorchIVF, TorchIVFFlat, TorchSimilaritySearchFlat, TorchSimilaritySearchIVF

__all__ = [
    "FLAT",
    "GRAPH",
    "IVF",
    "LIBRARIES",
    "Entry",
    "Variant",
    "make",
    "missing",
    "owners",
    "paired",
    "settle_native",
]


NATIVE = "torch_ivf_module.native"  # its `available()` says whether the kernel is built for this machine


@dataclass(frozen=True)
class Entry:
    """A name in the tables: an adapter, the package it needs, and what is set on its index to search."""

    adapter: type[Engine]
    library: str
    settings: Mapping[str, Any] = field(default_factory=dict)


IVF: dict[str, Entry] = {
    "ours": Entry(OursIVF, "torch_ivf_module", {"search_mode": "auto"}),
    "ours-csr": Entry(OursInTorch, "torch_ivf_module", {"search_mode": "csr"}),
    "ours-matrix": Entry(OursInTorch, "torch_ivf_module", {"search_mode": "matrix"}),
    "ours-native": Entry(OursIVF, NATIVE, {"search_mode": "native"}),
    "faiss": Entry(FaissIVF, "faiss", {"parallel_mode": 0}),  # its default: threads share out the queries
    "faiss-lists": Entry(FaissIVF, "faiss", {"parallel_mode": 1}),  # threads share out one query's lists
    "torch-ivf": Entry(TorchIVF, "torch_ivf", {"search_mode": "csr"}),
    "torch-ivf-matrix": Entry(TorchIVF, "torch_ivf", {"search_mode": "matrix"}),  # its default
    "torch-similarity-search": Entry(TorchSimilaritySearchIVF, "torch_similarity_search"),
}

FLAT: dict[str, Entry] = {
    "ours": Entry(OursFlat, "torch_ivf_module"),
    "faiss": Entry(FaissFlat, "faiss"),
    "torch-ivf": Entry(TorchIVFFlat, "torch_ivf", {"search_mode": "auto"}),
    "torch-similarity-search": Entry(TorchSimilaritySearchFlat, "torch_similarity_search"),
    "sklearn": Entry(Sklearn, "sklearn"),
}

GRAPH: dict[str, Entry] = {
    "hnswlib": Entry(Hnswlib, "hnswlib"),
    "usearch": Entry(Usearch, "usearch"),
}

LIBRARIES: dict[str, str] = {name: entry.library for name, entry in {**IVF, **FLAT, **GRAPH}.items()}


class Variant:
    """An adapter's index, with this name's settings put in place before it searches."""

    def __init__(self, owner: Engine, settings: Mapping[str, Any]) -> None:
        self.owner = owner
        self.settings = tuple(settings.items())

    def __getattr__(self, name: str) -> Any:
        return getattr(self.owner, name)

    def search(self, x: Any, k: int) -> Any:
        for name, value in self.settings:
            if getattr(self.owner.index, name) != value:
                setattr(self.owner.index, name, value)
        return self.owner.search(x, k)


def missing(names: Iterable[str]) -> dict[str, str]:
    """The names whose library cannot be used here, each with the reason."""
    reasons: dict[str, str] = {}
    for name in names:
        library = LIBRARIES[name]
        try:
            module = importlib.import_module(library)
        except ImportError as error:
            reasons[name] = f"{library} cannot be imported: {error.msg}"
            continue
        if library == NATIVE and not module.available():
            reasons[name] = "the native kernel is not built"
    return reasons


def settle_native() -> bool:
    """Have the native kernel built now, or keep it out: whether it is there.

    A large search would start a build in the background, beside everything that is being timed.
    """
    try:
        native = importlib.import_module(NATIVE)
    except ImportError:
        return False
    if native.enabled() and not native.available():
        try:
            print("building the native kernel, once")
            native.build()
        except RuntimeError as error:
            print(f"without the native kernel: {error}")
            os.environ["TORCH_IVF_NATIVE"] = "0"
    return bool(native.available())


def make(names: Iterable[str], table: Mapping[str, Entry], spec: Spec) -> dict[str, Variant]:
    """An empty engine for each name that `table` knows; names of one adapter share its index."""
    adapters: dict[type[Engine], Engine] = {}
    engines: dict[str, Variant] = {}
    for name in names:
        if name not in table:
            continue
        adapter = table[name].adapter
        if adapter not in adapters:
            adapters[adapter] = adapter(spec)
        engines[name] = Variant(adapters[adapter], table[name].settings)
    return engines


def owners(engines: Mapping[str, Variant]) -> dict[str, Engine]:
    """Each index once, under the first name that searches it."""
    seen: dict[int, str] = {}
    for name, variant in engines.items():
        seen.setdefault(id(variant.owner), name)
    return {name: engines[name].owner for name in seen.values()}


def paired(
    engines: Mapping[str, Variant], train: np.ndarray, base: np.ndarray, given: np.ndarray | None
) -> None:
    """Build list-based engines on the same centroids: those given, or else the first engine's own."""
    for engine in owners(engines).values():
        if given is None:
            engine.train(train)
            given = np.array(engine.centroids())
        else:
            engine.use_centroids(given)
        engine.add(engine.native(base))
