"""The other indexes written in PyTorch: torch-ivf and torch-similarity-search."""

from __future__ import annotations

from typing import Any

import numpy as np

from .contract import Spec, TorchEngine


class TorchIVF(TorchEngine):
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


class TorchIVFFlat(TorchEngine):
    knob = None

    def __init__(self, spec: Spec) -> None:
        from torch_ivf.index import IndexFlatIP, IndexFlatL2

        super().__init__(spec)
        self.index = (IndexFlatL2 if spec.metric == "l2" else IndexFlatIP)(spec.d)


# torch-similarity-search works on a whole batch at once: longer ones go in pieces, by the bytes that takes.
_TSS_BYTES = 512 << 20


class _TorchSimilaritySearch(TorchEngine):
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
