"""faiss-cpu."""

from __future__ import annotations

import numpy as np

from .contract import Engine, Spec


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
