"""One adapter per library: it takes float32 numpy rows and gives numpy ids.

`convert` turns rows into what the library takes, outside the timing; `search` is the library's own call alone.
"""

import importlib
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch


@dataclass(frozen=True)
class Spec:
    """What an index is to be."""

    d: int
    nlist: int
    metric: str = "l2"  # "l2", "ip" or "cosine"; for cosine every row has unit length
    seed: int = 1234
    threads: int = 2


class Engine:
    """The contract of an adapter; `index` is the library's own object."""

    parameter: ClassVar[str | None] = "nprobe"  # what trades recall for speed; None for exhaustive search
    index: Any

    def __init__(self, spec: Spec) -> None:
        self.spec = spec
        self.index = self.make(spec)

    def make(self, spec: Spec) -> Any:
        """The empty index."""
        raise NotImplementedError

    def convert(self, x: np.ndarray) -> Any:
        return x

    def train(self, x: np.ndarray, niter: int | None = None) -> None:
        """Train the lists, if the library has any, in `niter` iterations or in its default number."""

    def centroids(self) -> np.ndarray:
        raise NotImplementedError

    def use_centroids(self, centroids: np.ndarray) -> None:
        raise NotImplementedError

    def add(self, x: Any) -> None:
        """Add converted rows; their ids count from 0 in the order of adding."""
        self.index.add(x)

    def remove(self, ids: Any) -> None:
        self.index.remove_ids(ids)

    def set(self, value: int) -> None:
        self.index.nprobe = value

    def search(self, x: Any, k: int) -> Any:
        return self.index.search(x, k)

    def ids(self, answer: Any) -> np.ndarray:
        return np.asarray(answer[1]).astype(np.int64)


class TorchEngine(Engine):
    def convert(self, x: np.ndarray) -> Any:
        return torch.from_numpy(np.ascontiguousarray(x))

    def centroids(self) -> np.ndarray:
        return self.index.state_dict()["centroids"].numpy()

    def use_centroids(self, centroids: np.ndarray) -> None:
        lists = torch.zeros(self.spec.nlist + 1, dtype=torch.int64)
        state = {**self.index.state_dict(), "centroids": torch.tensor(centroids), "list_offsets": lists}
        self.index.load_state_dict(state)


class OursIVF(TorchEngine):
    module, rounds, cosine = "torch_ivf_module", "niter", "cosine"

    def make(self, spec: Spec) -> Any:
        metric = self.cosine if spec.metric == "cosine" else spec.metric
        return importlib.import_module(self.module).IndexIVFFlat(spec.d, nlist=spec.nlist, metric=metric)

    def train(self, x: np.ndarray, niter: int | None = None) -> None:
        iterations = {} if niter is None else {self.rounds: niter}
        self.index.train(self.convert(x), generator=torch.Generator().manual_seed(self.spec.seed), **iterations)


class TorchIVF(OursIVF):
    module, rounds, cosine = "torch_ivf.index", "max_iter", "ip"  # of rows of unit length


class FaissIVF(Engine):
    def make(self, spec: Spec) -> Any:
        faiss = importlib.import_module("faiss")
        self.quantizer = FaissFlat(spec).index
        return faiss.IndexIVFFlat(self.quantizer, spec.d, spec.nlist, self.quantizer.metric_type)

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


class OursFlat(TorchEngine):
    parameter = None
    module = "torch_ivf_module"

    def make(self, spec: Spec) -> Any:
        module = importlib.import_module(self.module)
        return (module.IndexFlatL2 if spec.metric == "l2" else module.IndexFlatIP)(spec.d)


class TorchIVFFlat(OursFlat):
    module = "torch_ivf.index"


class FaissFlat(OursFlat):
    module = "faiss"
    convert = Engine.convert

    def make(self, spec: Spec) -> Any:
        importlib.import_module("faiss").omp_set_num_threads(spec.threads)
        return super().make(spec)


class Sklearn(Engine):
    parameter = None

    def make(self, spec: Spec) -> Any:
        metric = "sqeuclidean" if spec.metric == "l2" else "cosine"
        return importlib.import_module("sklearn.neighbors").NearestNeighbors(algorithm="brute", metric=metric)

    def add(self, x: np.ndarray) -> None:
        self.index.fit(x)

    def search(self, x: np.ndarray, k: int) -> Any:
        return self.index.kneighbors(x, k)


class Hnswlib(Engine):
    parameter = "ef"

    def make(self, spec: Spec) -> Any:
        return importlib.import_module("hnswlib").Index(space="l2" if spec.metric == "l2" else "ip", dim=spec.d)

    def add(self, x: np.ndarray) -> None:
        self.index.init_index(len(x), M=16, ef_construction=200, random_seed=self.spec.seed)
        self.index.set_num_threads(self.spec.threads)
        self.index.add_items(x)

    def set(self, value: int) -> None:
        self.index.set_ef(value)

    def search(self, x: np.ndarray, k: int) -> Any:
        return self.index.knn_query(x, k)

    def ids(self, answer: Any) -> np.ndarray:
        return answer[0].astype(np.int64)


class Usearch(Engine):
    parameter = "ef"

    def make(self, spec: Spec) -> Any:
        metric = "l2sq" if spec.metric == "l2" else "ip"
        index = importlib.import_module("usearch.index").Index
        return index(ndim=spec.d, metric=metric, dtype="f32", connectivity=16, expansion_add=200)

    def add(self, x: np.ndarray) -> None:
        self.index.add(np.arange(len(x)), x, threads=self.spec.threads)

    def set(self, value: int) -> None:
        self.index.expansion_search = value

    def search(self, x: np.ndarray, k: int) -> Any:
        return self.index.search(x, k, threads=self.spec.threads)

    def ids(self, answer: Any) -> np.ndarray:
        # One query comes without its first axis; unused places are beyond `counts`.
        keys = np.atleast_2d(answer.keys).astype(np.int64)
        counts = np.full(len(keys), getattr(answer, "counts", keys.shape[1]))
        return np.where(np.arange(keys.shape[1]) < counts[:, None], keys, -1)
