"""One adapter per library: it takes float32 numpy rows and gives numpy ids.

`convert` turns rows into what the library takes, outside the timing; `search` is the library's own call alone.
"""

import importlib
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

import torch_ivf_module


@dataclass(frozen=True)
class Spec:
    """What an index is to be."""

    d: int
    nlist: int
    metric: str = "l2"  # "l2", "ip" or "cosine"; for cosine every row has unit length
    seed: int = 1234
    threads: int = 2
    rows: str = "Flat"  # how rows are stored, as the library's index_factory names it; half is d / 2
    device: str = "cpu"  # of PyTorch's indexes and rows; other libraries are on the CPU

    @property
    def factory(self) -> str:
        return f"IVF{self.nlist},{self.rows}".format(half=self.d // 2)


class Engine:
    """The contract of an adapter; `index` is the library's own object."""

    parameter = "nprobe"  # what trades recall for speed
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

    def use_centroids(self, centroids: np.ndarray, rows: Any = None) -> None:
        """Take these in place of training lists, if it can; what else has to be trained is, on `rows`."""

    def warm(self, x: Any) -> None:
        """Have the library make, from 64 queries on, what it makes when an index has been searched often enough."""

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
        return torch.from_numpy(np.ascontiguousarray(x)).to(self.spec.device)

    def ids(self, answer: Any) -> np.ndarray:
        return super().ids(tuple(part.cpu() for part in answer))

    def centroids(self) -> np.ndarray:
        return self.index.state_dict()["centroids"].cpu().numpy()

    def use_centroids(self, centroids: np.ndarray, rows: Any = None) -> None:
        lists = torch.zeros(self.spec.nlist + 1, dtype=torch.int64, device=self.spec.device)
        given = torch.tensor(centroids, device=self.spec.device)
        state = {**self.index.state_dict(), "centroids": given, "list_offsets": lists}
        self.index.load_state_dict(state)


class OursIVF(TorchEngine):
    rounds = "niter"

    def make(self, spec: Spec) -> Any:
        return torch_ivf_module.index_factory(spec.d, spec.factory, spec.metric).to(spec.device)

    def warm(self, x: Any) -> None:
        self.index.search(x, 1, params=torch_ivf_module.SearchParams(nprobe=self.spec.nlist))

    def bytes(self) -> int:
        return int(self.index.memory_bytes())

    def train(self, x: np.ndarray, niter: int | None = None) -> None:
        iterations = {} if niter is None else {self.rounds: niter}
        self.index.train(self.convert(x), generator=torch.Generator().manual_seed(self.spec.seed), **iterations)


class TorchIVF(OursIVF):
    rounds, warm = "max_iter", Engine.warm

    def make(self, spec: Spec) -> Any:
        metric = "l2" if spec.metric == "l2" else "ip"  # of rows of unit length
        module = importlib.import_module("torch_ivf.index")
        return module.IndexIVFFlat(spec.d, nlist=spec.nlist, metric=metric).to(spec.device)


class FaissIVF(Engine):
    def make(self, spec: Spec) -> Any:
        self.faiss = faiss = importlib.import_module("faiss")
        index = faiss.index_factory(spec.d, spec.factory, FaissFlat(spec).index.metric_type)
        self.ivf = faiss.extract_index_ivf(index)  # the index itself, or what a refinement is around
        self.quantizer = faiss.downcast_index(self.ivf.quantizer)
        return index

    def set(self, value: int) -> None:
        self.ivf.nprobe = value

    def bytes(self) -> int:
        return int(self.faiss.serialize_index(self.index).nbytes)

    def train(self, x: np.ndarray, niter: int | None = None) -> None:
        self.ivf.cp.seed = self.spec.seed
        if niter is not None:
            self.ivf.cp.niter = niter
        self.index.train(x)

    def centroids(self) -> np.ndarray:
        return self.quantizer.reconstruct_n(0, self.spec.nlist)

    def use_centroids(self, centroids: np.ndarray, rows: Any = None) -> None:
        self.quantizer.add(centroids)
        if rows is None:
            self.index.is_trained = True
        else:
            self.index.train(rows)  # leaves centroids that are there as they are


class OursFlat(TorchEngine):
    module = "torch_ivf_module"

    def make(self, spec: Spec) -> Any:
        module = importlib.import_module(self.module)
        index = (module.IndexFlatL2 if spec.metric == "l2" else module.IndexFlatIP)(spec.d)
        return index.to(spec.device) if self.module == OursFlat.module else index

    def warm(self, x: Any) -> None:
        self.search(x, 1)


class FaissFlat(OursFlat):
    module = "faiss"
    convert, ids = Engine.convert, Engine.ids

    def make(self, spec: Spec) -> Any:
        importlib.import_module("faiss").omp_set_num_threads(spec.threads)
        return super().make(spec)


class Product(TorchEngine):
    """Brute force on the device: `torch.matmul` with all rows and `topk`, in parts of the scores that fit."""

    _SCORES = 1 << 28  # at a time: 1 GiB

    def make(self, spec: Spec) -> Any:
        return None  # the rows

    def use_centroids(self, centroids: np.ndarray, rows: Any = None) -> None:
        """It has no lists."""

    def set(self, value: int) -> None:
        """It probes nothing."""

    def add(self, x: Any) -> None:
        self.index = x if self.index is None else torch.cat([self.index, x])
        self.bias = self.index.square().sum(1) / -2 if self.spec.metric == "l2" else self.index.new_zeros(())

    def search(self, x: Any, k: int) -> Any:
        parts = x.split(max(1, self._SCORES // len(self.index)))
        found = [torch.add(torch.matmul(part, self.index.t()), self.bias).topk(k) for part in parts]
        return torch.cat([part.values for part in found]), torch.cat([part.indices for part in found])


class Hnswlib(Engine):
    parameter = "ef"

    def make(self, spec: Spec) -> Any:
        return importlib.import_module("hnswlib").Index("l2" if spec.metric == "l2" else "ip", spec.d)

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


class Scann(Engine):
    """scann-core-torch, with lists of its own: 4-bit codes of two dimensions each, k_factor * k rows ranked again."""

    parameter = "leaves"

    def convert(self, x: np.ndarray) -> Any:
        return torch.from_numpy(np.ascontiguousarray(x))

    def make(self, spec: Spec) -> Any:
        return None  # made of the rows

    def add(self, x: Any) -> None:
        metric = "squared_l2" if self.spec.metric == "l2" else "dot_product"
        threshold = float("nan") if metric == "squared_l2" else 0.2  # that of its documentation
        builder = importlib.import_module("scann.torch").builder(x.numpy(), 10, metric)
        tree = builder.set_n_training_threads(self.spec.threads).tree(self.spec.nlist, 1)
        self.index = tree.score_ah(2, anisotropic_quantization_threshold=threshold).reorder(100).build()
        self.index.k_factor = 10  # named as in faiss

    def set(self, value: int) -> None:
        self.leaves = value

    def bytes(self) -> int:
        return sum(part.nbytes for part in self.index.state_dict().values())

    def search(self, x: Any, k: int) -> Any:
        search = self.index.search_batched_parallel if len(x) > 1 else self.index.search_batched
        return search(x, k, pre_reorder_num_neighbors=k * self.index.k_factor, leaves_to_search=self.leaves)[::-1]
