"""The engines by the names they have in the tables. Variants of one adapter share one index."""

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from torch_ivf_module import native

from . import adapters
from .adapters import Engine, Spec


@dataclass(frozen=True)
class Entry:
    """A name in the tables: an adapter, the package it needs, and what is set on its index to search."""

    adapter: type[Engine]
    library: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    kernel: bool = True  # whether this library may use its native kernel


_OURS = "torch_ivf_module"
IVF: dict[str, Entry] = {
    "ours": Entry(adapters.OursIVF, _OURS, {"search_mode": "auto"}),
    "ours-csr": Entry(adapters.OursIVF, _OURS, {"search_mode": "csr"}, kernel=False),
    "ours-matrix": Entry(adapters.OursIVF, _OURS, {"search_mode": "matrix"}, kernel=False),
    "ours-graph": Entry(adapters.OursGraph, _OURS),
    "faiss": Entry(adapters.FaissIVF, "faiss", {"parallel_mode": 0}),  # default: threads share a batch's queries
    "faiss-lists": Entry(adapters.FaissIVF, "faiss", {"parallel_mode": 1}),  # threads share one query's lists
    "torch-ivf": Entry(adapters.TorchIVF, "torch_ivf", {"search_mode": "csr"}),
    "torch-ivf-matrix": Entry(adapters.TorchIVF, "torch_ivf", {"search_mode": "matrix"}),  # its default
}
FLAT: dict[str, Entry] = {
    "ours": Entry(adapters.OursFlat, _OURS),
    "faiss": Entry(adapters.FaissFlat, "faiss"),
    "torch-ivf": Entry(adapters.TorchIVFFlat, "torch_ivf", {"search_mode": "auto"}),
    "sklearn": Entry(adapters.Sklearn, "sklearn"),
}
GRAPH: dict[str, Entry] = {
    "hnswlib": Entry(adapters.Hnswlib, "hnswlib"),
    "usearch": Entry(adapters.Usearch, "usearch"),
}
LIBRARIES: dict[str, str] = {name: entry.library for name, entry in {**IVF, **FLAT, **GRAPH}.items()}


class Variant:
    """An adapter's index, searched with the settings of one name."""

    def __init__(self, owner: Engine, entry: Entry) -> None:
        self.owner, self.entry = owner, entry

    def __getattr__(self, name: str) -> Any:
        return getattr(self.owner, name)

    def search(self, x: Any, k: int) -> Any:
        for name, value in self.entry.settings.items():
            if getattr(self.owner.index, name) != value:
                setattr(self.owner.index, name, value)
        if self.entry.kernel:
            return self.owner.search(x, k)
        with native.disabled():  # for the whole process
            return self.owner.search(x, k)


def build_kernel() -> bool:
    """Build the kernel before anything is timed, or else disable it for good: whether there is one."""
    if native.enabled() and not native.available():
        print("compiling the native kernel, once")
        try:
            native.build()
        except RuntimeError as error:
            print(f"without the native kernel: {error}")
            os.environ["TORCH_IVF_NATIVE"] = "0"
    return bool(native.available())


def make(names: Iterable[str], table: Mapping[str, Entry], spec: Spec) -> dict[str, Variant]:
    """An empty engine for each name that `table` knows; names of one adapter share its index."""
    known = [name for name in names if name in table]
    made = {adapter: adapter(spec) for adapter in dict.fromkeys(table[name].adapter for name in known)}
    return {name: Variant(made[table[name].adapter], table[name]) for name in known}


def owners(engines: Mapping[str, Variant]) -> list[Engine]:
    return list(dict.fromkeys(variant.owner for variant in engines.values()))


def build_paired(engines: Mapping[str, Variant], train: Any, base: np.ndarray, centroids: np.ndarray | None) -> None:
    """Build list-based engines on the same centroids: those given, or those that the first engine trains."""
    for engine in owners(engines):
        if centroids is None:
            engine.train(train)
            centroids = np.array(engine.centroids())
        else:
            engine.use_centroids(centroids)
        engine.add(engine.convert(base))
