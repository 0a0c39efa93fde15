"""One small adapter a library: build, set its parameters, search.

An adapter takes float32 numpy rows and gives numpy ids. `native` turns rows, once and outside the clock,
into what its library reads; `search` is the library's own call and nothing else. A variant is an adapter with
fixed attributes, and variants of one adapter share one index.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np

__all__ = [
    "FLAT",
    "GRAPH",
    "IVF",
    "LIBRARIES",
    "Engine",
    "Spec",
    "Variant",
    "make",
    "missing",
    "owners",
    "paired",
]


@dataclass(frozen=True)
class Spec:
    """What an index is to be."""

    d: int
    nlist: int
    metric: str = "l2"  # "l2", "ip" or "cosine"; for cosine every row comes at unit length
    seed: int = 1234
    threads: int = 2


class Engine:
    """The contract of an adapter; `index` is the library's own object."""

    knob: ClassVar[str | None] = "nprobe"  # what trades recall for speed; None where nothing does
    index: Any

    def __init__(self, spec: Spec) -> None:
        self.spec = spec

    def native(self, x: np.ndarray) -> Any:
        return x

    def train(self, x: np.ndarray, niter: int | None = None) -> None:
        """Fit the lists, if the library has any, in `niter` rounds or as many as it takes unasked."""

    def centroids(self) -> np.ndarray:
        raise NotImplementedError

    def use_centroids(self, centroids: np.ndarray) -> None:
        raise NotImplementedError

    def add(self, x: Any) -> None:
        """Add native rows; they are numbered from 0 in the order they come."""
        self.index.add(x)

    def remove(self, ids: Any) -> None:
        """Remove vectors by native ids."""
        self.index.remove_ids(ids)

    def set(self, value: int) -> None:
        """Set the knob."""
        self.index.nprobe = value

    def search(self, x: Any, k: int) -> Any:
        return self.index.search(x, k)

    def ids(self, answer: Any) -> np.ndarray:
        return np.asarray(answer[1]).astype(np.int64)


class _Torch(Engine):
    def native(self, x: np.ndarray) -> Any:
        import torch

        return torch.from_numpy(np.ascontiguousarray(x))


# ---------------------------------------------------------------------------------------------- this library


class OursIVF(_Torch):
    def __init__(self, spec: Spec) -> None:
        from torch_ivf_module import IndexIVFFlat

        super().__init__(spec)
        self.index = IndexIVFFlat(spec.d, nlist=spec.nlist, metric=spec.metric)

    def train(self, x: np.ndarray, niter: int | None = None) -> None:
        rounds = {} if niter is None else {"niter": niter}
        self.index.train(self.native(x), seed=self.spec.seed, **rounds)

    def centroids(self) -> np.ndarray:
        return self.index.centroids.numpy()

    def use_centroids(self, centroids: np.ndarray) -> None:
        import torch

        state = self.index.state_dict()
        state["centroids"] = torch.tensor(centroids)
        state["list_offsets"] = torch.zeros(self.spec.nlist + 1, dtype=torch.int64)
        self.index.load_state_dict(state)


class OursFlat(_Torch):
    knob = None

    def __init__(self, spec: Spec) -> None:
        from torch_ivf_module import IndexFlatIP, IndexFlatL2

        super().__init__(spec)
        self.index = (IndexFlatL2 if spec.metric == "l2" else IndexFlatIP)(spec.d)


# ------------------------------------------------------------------------------------------------- faiss-cpu


class FaissIVF(Engine):
    def __init__(self, spec: Spec) -> None:
        import faiss

        super().__init__(spec)
        faiss.omp_set_num_threads(spec.threads)
        l2 = spec.metric == "l2"
        self.quantizer = (faiss.IndexFlatL2 if l2 else faiss.IndexFlatIP)(spec.d)
        metric = faiss.METRIC_L2 if l2 else faiss.METRIC_INNER_PRODUCT
        self.index = faiss.IndexIVFFlat(self.quantizer, spec.d, spec.nlist, metric)

    def train(self, x: np.ndarray, niter: int | None = None) -> None:
        self.index.cp.seed = self.spec.seed
        if niter is not None:
            self.index.cp.niter = niter
        self.index.train(x)

    def centroids(self) -> np.ndarray:
        return self.quantizer.reconstruct_n(0, self.spec.nlist)

    def use_centroids(self, centroids: np.ndarray) -> None:
        self.quantizer.add(centroids)
        self.index.is_trained = True


class FaissFlat(Engine):
    knob = None

    def __init__(self, spec: Spec) -> None:
        import faiss

        super().__init__(spec)
        faiss.omp_set_num_threads(spec.threads)
        self.index = (faiss.IndexFlatL2 if spec.metric == "l2" else faiss.IndexFlatIP)(spec.d)


# ------------------------------------------------------------------------------------------------- torch-ivf


class TorchIVF(_Torch):
    def __init__(self, spec: Spec) -> None:
        from torch_ivf.index import IndexIVFFlat

        super().__init__(spec)
        metric = "l2" if spec.metric == "l2" else "ip"
        self.index = IndexIVFFlat(spec.d, nlist=spec.nlist, metric=metric)

    def train(self, x: np.ndarray, niter: int | None = None) -> None:
        import torch

        generator = torch.Generator().manual_seed(self.spec.seed)
        rounds = {} if niter is None else {"max_iter": niter}
        self.index.train(self.native(x), generator=generator, **rounds)

    def centroids(self) -> np.ndarray:
        return self.index.state_dict()["centroids"].numpy()

    def use_centroids(self, centroids: np.ndarray) -> None:
        import torch

        lists = torch.zeros(self.spec.nlist + 1, dtype=torch.int64)
        state = {**self.index.state_dict(), "centroids": torch.tensor(centroids), "list_offsets": lists}
        self.index.load_state_dict(state)


class TorchIVFFlat(_Torch):
    knob = None

    def __init__(self, spec: Spec) -> None:
        from torch_ivf.index import IndexFlatIP, IndexFlatL2

        super().__init__(spec)
        self.index = (IndexFlatL2 if spec.metric == "l2" else IndexFlatIP)(spec.d)


# ----------------------------------------------------------------------------------- torch-similarity-search

_TSS_BYTES = (
    512 * 2**20
)  # it works on a whole batch at once: longer ones go in pieces, by the bytes that takes


class _TorchSimilaritySearch(_Torch):
    def _rows_at_once(self) -> int:
        raise NotImplementedError

    def search(self, x: Any, k: int) -> Any:
        import torch

        rows = self._rows_at_once()
        if x.shape[0] <= rows:
            return self.index.search(x, k)
        parts = [self.index.search(part, k) for part in x.split(rows)]
        return tuple(torch.cat(column) for column in zip(*parts, strict=True))


class TorchSimilaritySearchIVF(_TorchSimilaritySearch):
    def __init__(self, spec: Spec) -> None:
        from torch_similarity_search import IVFFlatIndex

        super().__init__(spec)
        self.index = IVFFlatIndex(spec.d, spec.nlist, metric="l2" if spec.metric == "l2" else "ip")
        self.longest = 1

    def train(self, x: np.ndarray, niter: int | None = None) -> None:
        import torch

        with torch.random.fork_rng(devices=[]):  # it draws from the global generator and fixes niter itself
            torch.manual_seed(self.spec.seed)
            self.index.train(self.native(x))

    def centroids(self) -> np.ndarray:
        return self.index.centroids.numpy()

    def use_centroids(self, centroids: np.ndarray) -> None:
        import torch

        self.index.centroids = torch.tensor(centroids)
        self.index._is_trained = True

    def add(self, x: Any) -> None:
        for part in x.split(max(1, _TSS_BYTES // (4 * self.spec.nlist))):
            self.index.add(part)
        self.longest = max(1, int(self.index.list_sizes.max()))

    def _rows_at_once(self) -> int:
        return max(1, _TSS_BYTES // (self.index.nprobe * self.longest * self.spec.d * 4))


class TorchSimilaritySearchFlat(_TorchSimilaritySearch):
    knob = None

    def __init__(self, spec: Spec) -> None:
        from torch_similarity_search import FlatIndex

        super().__init__(spec)
        self.index = FlatIndex(spec.d, metric="l2" if spec.metric == "l2" else "ip")

    def _rows_at_once(self) -> int:
        return max(1, _TSS_BYTES // (4 * max(1, self.index.ntotal)))


# -------------------------------------------------------------------------------- scikit-learn's brute force


class Sklearn(Engine):
    knob = None

    def __init__(self, spec: Spec) -> None:
        from sklearn.neighbors import NearestNeighbors

        super().__init__(spec)
        if spec.metric == "ip":
            raise ValueError("scikit-learn's brute force has no inner product")
        metric = "sqeuclidean" if spec.metric == "l2" else "cosine"
        self.index = NearestNeighbors(algorithm="brute", metric=metric)

    def add(self, x: np.ndarray) -> None:
        self.index.fit(x)

    def search(self, x: np.ndarray, k: int) -> Any:
        return self.index.kneighbors(x, k)


# ------------------------------------------------------------------------------------ graph-based libraries

_M, _EF_CONSTRUCTION = 16, 200  # the customary HNSW settings, the same for both


class Hnswlib(Engine):
    knob = "ef"

    def __init__(self, spec: Spec) -> None:
        import hnswlib

        super().__init__(spec)
        self.index = hnswlib.Index(space="l2" if spec.metric == "l2" else "ip", dim=spec.d)

    def add(self, x: np.ndarray) -> None:
        self.index.init_index(x.shape[0], M=_M, ef_construction=_EF_CONSTRUCTION, random_seed=self.spec.seed)
        self.index.set_num_threads(self.spec.threads)
        self.index.add_items(x)

    def set(self, value: int) -> None:
        self.index.set_ef(value)

    def search(self, x: np.ndarray, k: int) -> Any:
        return self.index.knn_query(x, k)

    def ids(self, answer: Any) -> np.ndarray:
        return answer[0].astype(np.int64)


class Usearch(Engine):
    knob = "ef"

    def __init__(self, spec: Spec) -> None:
        from usearch.index import Index

        super().__init__(spec)
        metric = "l2sq" if spec.metric == "l2" else "ip"
        self.index = Index(
            ndim=spec.d, metric=metric, dtype="f32", connectivity=_M, expansion_add=_EF_CONSTRUCTION
        )

    def add(self, x: np.ndarray) -> None:
        self.index.add(np.arange(x.shape[0]), x, threads=self.spec.threads)

    def set(self, value: int) -> None:
        self.index.expansion_search = value

    def search(self, x: np.ndarray, k: int) -> Any:
        return self.index.search(x, k, threads=self.spec.threads)

    def ids(self, answer: Any) -> np.ndarray:
        # An answer to one query comes without its first axis; unused slots are cut off by `counts`.
        keys = np.atleast_2d(answer.keys).astype(np.int64)
        counts = np.full(len(keys), getattr(answer, "counts", keys.shape[1]))
        return np.where(np.arange(keys.shape[1]) < counts[:, None], keys, -1)


# ---------------------------------------------------------------------------------------------- the registry


@dataclass(frozen=True)
class Entry:
    """A name in the tables: an adapter, the package it needs, and what is set on its index to search."""

    adapter: type[Engine]
    library: str
    settings: Mapping[str, Any] = field(default_factory=dict)


IVF: dict[str, Entry] = {
    "ours": Entry(OursIVF, "torch_ivf_module", {"search_mode": "auto"}),
    "ours-csr": Entry(OursIVF, "torch_ivf_module", {"search_mode": "csr"}),
    "ours-matrix": Entry(OursIVF, "torch_ivf_module", {"search_mode": "matrix"}),
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
    """The names whose library cannot be imported, each with the reason."""
    reasons: dict[str, str] = {}
    for name in names:
        try:
            importlib.import_module(LIBRARIES[name])
        except ImportError as error:
            reasons[name] = f"{LIBRARIES[name]} cannot be imported: {error.msg}"
    return reasons


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
