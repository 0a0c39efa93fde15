"""scikit-learn's brute force, and the graph-based libraries."""

from __future__ import annotations

from typing import Any

import numpy as np

from .contract import Engine, Spec


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
