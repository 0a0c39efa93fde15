"""This library."""

from __future__ import annotations

import os
from typing import Any

import numpy as np

from .contract import Spec, TorchEngine


class OursIVF(TorchEngine):
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


class OursInTorch(OursIVF):
    """In PyTorch operations alone, where the kernel would find the lists that a query reads."""

    def search(self, queries: Any, k: int) -> Any:
        before = os.environ.get("TORCH_IVF_NATIVE", "1")
        os.environ["TORCH_IVF_NATIVE"] = "0"
        try:
            return super().search(queries, k)
        finally:
            os.environ["TORCH_IVF_NATIVE"] = before


class OursFlat(TorchEngine):
    knob = None

    def __init__(self, spec: Spec) -> None:
        from torch_ivf_module import IndexFlatIP, IndexFlatL2

        super().__init__(spec)
        self.index = (IndexFlatL2 if spec.metric == "l2" else IndexFlatIP)(spec.d)
