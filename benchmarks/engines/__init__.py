"""The engines by the names they have in the tables. Variants of one adapter share one index."""

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from torch_ivf_module import native
from torch_ivf_module.gpu.scan import SCAN

from . import adapters
from .adapters import Engine, Spec


@dataclass(frozen=True)
class Entry:
    """A name in the tables: an adapter, the package it needs, and what is set on its index to search."""

    adapter: type[Engine]
    library: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    kernel: bool = True  # whether this library may use its native kernel
    rows: str = "Flat"  # how rows are stored, as the library's index_factory names it
    triton: bool = False  # whether this library uses its scan in Triton, as with TORCH_IVF_TRITON=1
    accelerator: bool = False  # whether it takes part on accelerators alone

    @property
    def owner(self) -> tuple[Any, ...]:
        """What an index can be shared by: another setting of `codes` would free the codes."""
        return self.adapter, self.rows, self.settings.get("codes", "auto")


_OURS = "torch_ivf_module"
IVF: dict[str, Entry] = {
    "ours": Entry(adapters.OursIVF, _OURS, {"search_mode": "auto"}),
    "ours-float": Entry(adapters.OursIVF, _OURS, {"search_mode": "auto", "codes": None}),  # reads no 8-bit codes
    "ours-csr": Entry(adapters.OursIVF, _OURS, {"search_mode": "csr"}, kernel=False),
    "ours-matrix": Entry(adapters.OursIVF, _OURS, {"search_mode": "matrix"}, kernel=False),
    "faiss": Entry(adapters.FaissIVF, "faiss", {"parallel_mode": 0}),  # default: threads share a batch's queries
    "faiss-lists": Entry(adapters.FaissIVF, "faiss", {"parallel_mode": 1}),  # threads share one query's lists
    "torch-ivf": Entry(adapters.TorchIVF, "torch_ivf", {"search_mode": "csr"}),
    "ours-triton": Entry(adapters.OursIVF, _OURS, {"search_mode": "auto"}, triton=True, accelerator=True),
    "matmul": Entry(adapters.Product, "torch", accelerator=True),  # of all vectors
}
FLAT: dict[str, Entry] = {
    "ours": Entry(adapters.OursFlat, _OURS),
    "ours-float": Entry(adapters.OursFlat, _OURS, {"codes": None}),
    "faiss": Entry(adapters.FaissFlat, "faiss"),
    "ours-triton": Entry(adapters.OursFlat, _OURS, triton=True, accelerator=True),
    "matmul": IVF["matmul"],
}
QUANTIZED: dict[str, Entry] = {  # list-based, with vectors in fewer bits
    "ours": IVF["ours"],
    "ours-float16": Entry(adapters.OursIVF, _OURS, rows="SQfp16"),
    "ours-sq8": Entry(adapters.OursIVF, _OURS, rows="SQ8"),
    "ours-sq8-codes": Entry(adapters.OursIVF, _OURS, {"codes": 8}, rows="SQ8"),
    "ours-sq4": Entry(adapters.OursIVF, _OURS, rows="SQ4"),
    "faiss": IVF["faiss"],
    "faiss-sq8": Entry(adapters.FaissIVF, "faiss", rows="SQ8"),
    "faiss-sq4": Entry(adapters.FaissIVF, "faiss", rows="SQ4"),
    "faiss-pq": Entry(adapters.FaissIVF, "faiss", {"k_factor": 10}, rows="PQ{half}x4fsr,RFlat"),
    "scann": Entry(adapters.Scann, "scann.torch", {"k_factor": 10}, rows="AH,reorder"),
}
CURVES: dict[str, Entry] = {  # each with its own training; a mode that differs in speed alone would add nothing
    **{name: QUANTIZED[name] for name in ("ours", "ours-sq8", "faiss", "faiss-sq8", "faiss-pq", "scann")},
    "faiss-pq-50": replace(QUANTIZED["faiss-pq"], settings={"k_factor": 50}),  # ranks 50 * k candidates again
    "scann-50": replace(QUANTIZED["scann"], settings={"k_factor": 50}),
    "torch-ivf": IVF["torch-ivf"],
    "hnswlib": Entry(adapters.Hnswlib, "hnswlib"),
}
_ALL = {**IVF, **FLAT, **QUANTIZED, **CURVES}
LIBRARIES: dict[str, str] = {name: entry.library for name, entry in _ALL.items()}


def default(device: str) -> tuple[str, ...]:
    """The engines that take part if none are named."""
    return tuple(name for name, entry in _ALL.items() if device != "cpu" or not entry.accelerator)


class Variant:
    """An adapter's index, searched with the settings of one name."""

    def __init__(self, owner: Engine, entry: Entry) -> None:
        self.owner, self.entry = owner, entry

    def __getattr__(self, name: str) -> Any:
        return getattr(self.owner, name)

    def warm(self, x: Any) -> None:
        if self.entry.kernel:
            self._set()
            self.owner.warm(x)

    def _set(self) -> None:
        SCAN.enabled = self.entry.triton
        for name, value in self.entry.settings.items():
            if getattr(self.owner.index, name) != value:
                setattr(self.owner.index, name, value)

    def search(self, x: Any, k: int) -> Any:
        self._set()
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
    """An empty engine for each name that `table` knows; names that store the same share an index."""
    known = [name for name in names if name in table]
    owners = {table[name].owner: table[name] for name in known}
    made = {owner: entry.adapter(replace(spec, rows=entry.rows)) for owner, entry in owners.items()}
    return {name: Variant(made[table[name].owner], table[name]) for name in known}


def build_paired(engines: Mapping[str, Variant], train: Any, base: np.ndarray, centroids: np.ndarray | None) -> None:
    """Build list-based engines on the same centroids: those given, or those that the first engine trains."""
    for engine in dict.fromkeys(variant.owner for variant in engines.values()):
        if centroids is None:
            engine.train(train)
            centroids = np.array(engine.centroids())
        else:
            engine.use_centroids(centroids, train)
        engine.add(engine.convert(base))
