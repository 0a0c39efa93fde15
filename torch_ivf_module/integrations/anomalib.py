"""anomalib's PatchCore with an index as its memory bank (extra `anomalib`).

n vectors, d dim, Q queries, k results.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from .._optional import require
from ..functional.row_codes import vectors_of
from ..index import IndexFlatL2
from ..index.base import IndexBase

__all__ = ["MemoryBank", "PatchcoreModel", "with_index"]

_components: Any = require("anomalib.models.components", "anomalib")
_patchcore: Any = require("anomalib.models.image.patchcore.torch_model", "anomalib")
Model = TypeVar("Model", bound=nn.Module)


class MemoryBank(nn.Module):
    """An index of metric "l2" with the methods of a tensor (n, d) that PatchCore calls."""

    def __init__(self, index: IndexBase) -> None:
        super().__init__()
        if index.metric != "l2":
            raise ValueError(f"index must have metric 'l2', the metric of PatchCore, got {index.metric!r}")
        self.index = index

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the vectors."""
        return self.index.dtype

    @property
    def shape(self) -> torch.Size:
        """(n, d)."""
        return torch.Size((self.index.ntotal, self.index.d))

    def size(self, dim: int) -> int:
        """n for dimension 0, d for 1."""
        return self.shape[dim]

    def __getitem__(self, at: Tensor | tuple[Tensor, slice]) -> Tensor:
        """The vectors (…, d) whose numbers are `at` (…)."""
        at = at[0] if isinstance(at, tuple) else at
        if torch.compiler.is_exporting():
            return self.rows()[at]
        return self.index.reconstruct_batch(at.flatten()).view(*at.shape, -1)

    def rows(self) -> Tensor:
        """The vectors (n, d) list by list, for torch.export, which has packed them."""
        return vectors_of(self.index.store.packed, self.index.d)

    def fill(self, vectors: Tensor) -> None:
        """Replace all vectors by (n, d)."""
        self.index.reset()
        self.index.train(vectors)
        self.index.add(vectors)


class PatchcoreModel(_patchcore.PatchcoreModel):  # type: ignore[misc]
    """anomalib's PatchcoreModel whose `memory_bank` is a `MemoryBank`; made by `with_index`.

    In a graph that torch.export records, for example for ONNX or OpenVINO, it compares with all vectors, as anomalib's
    model does. It can load the state_dict of anomalib's model.
    """

    memory_bank: MemoryBank

    def subsample_embedding(self, sampling_ratio: float, embeddings: None = None) -> None:
        """Fill the index with a coreset of the embeddings collected in training."""
        if not self.embedding_store:
            raise ValueError("there are no embeddings to choose from: run the model in training mode first")
        collected = torch.vstack(self.embedding_store)
        self.embedding_store.clear()
        self.memory_bank.fill(_components.KCenterGreedy(collected, sampling_ratio).sample_coreset())

    def nearest_neighbors(self, embedding: Tensor, n_neighbors: int) -> tuple[Tensor, Tensor]:
        """Distances and numbers of the nearest in the bank: (Q, n_neighbors), or (Q,) for one."""
        if torch.compiler.is_exporting():
            every = self.euclidean_dist(embedding, self.memory_bank.rows())
            distances, at = every.topk(n_neighbors, largest=False, dim=1)
        else:
            squares, at = self.memory_bank.index.search(embedding, n_neighbors)
            distances = squares.sqrt().to(embedding.dtype)
        return (distances[:, 0], at[:, 0]) if n_neighbors == 1 else (distances, at)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *settings: Any) -> None:
        name = f"{prefix}memory_bank"
        if (vectors := state_dict.pop(name, None)) is not None:  # as anomalib's own model has it
            bank = copy.deepcopy(self.memory_bank)
            if len(vectors):
                bank.fill(vectors.to(bank.index.device))
            else:
                bank.index.reset()
            state_dict.update({f"{name}.{key}": value for key, value in bank.state_dict().items()})
        super()._load_from_state_dict(state_dict, prefix, *settings)


def with_index(model: Model, index: Callable[[int], IndexBase] = IndexFlatL2) -> Model:
    """Replace the memory bank of anomalib's PatchCore by an index, in place.

    Parameters
    ----------
    model : anomalib's `Patchcore`, or the `PatchcoreModel` inside; fitted or not.
    index : a function of the dimension d that returns an empty index with metric "l2". The default is exact.
        ``lambda d: IndexIVFFlat(d, nlist=64, nprobe=8)`` searches a part of the bank.

    Returns `model`. Raises TypeError for another model, ValueError for an index of another metric.
    """
    inner: Any = getattr(model, "model", model)
    if type(inner) is not _patchcore.PatchcoreModel:
        raise TypeError(f"model must be anomalib's Patchcore or PatchcoreModel, got {type(model).__name__}")
    known = inner.memory_bank
    bank = MemoryBank(index(sum(inner.feature_extractor.out_dims)).to(known.device, known.dtype))
    if len(known):
        bank.fill(known)
    del inner.memory_bank
    inner.memory_bank = bank
    inner.__class__ = PatchcoreModel
    return model
