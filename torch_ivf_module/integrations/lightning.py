"""A Lightning callback that keeps an index of embeddings during training and logs kNN accuracy (extra `lightning`).

Q queries, n vectors, d dim.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from .._optional import require
from ..index import IndexFlat
from ..index.base import IndexBase

__all__ = ["KNNAccuracy"]

_lightning: Any = require("lightning.pytorch", "lightning")
Batches = Iterable[tuple[Tensor, Tensor]]


class KNNAccuracy(_lightning.Callback):  # type: ignore[misc]
    """Logs the accuracy of a k-nearest-neighbour classifier on the validation samples.

    Before each validation, the embeddings of the reference set are computed and added to a new index. A sample is
    assigned to the class with the most votes of its k nearest neighbours, each weighted by exp(cosine / temperature),
    as in the evaluation of DINO (Caron et al., ICCV 2021). The attribute `index` is the index, `labels` (n,) the
    labels.

    Parameters
    ----------
    reference : batches (x, labels) of the reference set, such as a DataLoader. Validation batches are (x, labels) too.
    k, temperature : number of neighbours and weighting of votes, as above.
    index : a function of the dimension d that returns an empty index with metric "cosine"; it is trained if it has
        lists.
    embed : ``embed(module, x)`` returns the embeddings (Q, d) of x; None for ``module(x)``.
    name : the name of the logged value.

    With several processes, each fills an index with the whole reference set, and the accuracy is that of all processes.
    The callback does not run in the sanity check.
    """

    def __init__(
        self,
        reference: Batches,
        *,
        k: int = 20,
        temperature: float = 0.07,
        index: Callable[[int], IndexBase] | None = None,
        embed: Callable[[Any, Tensor], Tensor] | None = None,
        name: str = "knn_accuracy",
    ) -> None:
        self.reference = reference
        self.k = k
        self.temperature = temperature
        self.name = name
        self.index: IndexBase | None = None
        self.labels = torch.empty(0, dtype=torch.int64)
        self._make_index = index or functools.partial(IndexFlat, metric="cosine")
        self._embed = embed or _called

    def on_validation_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        """Fill the index."""
        if not trainer.sanity_checking:
            self.fill(pl_module)

    def on_validation_batch_end(
        self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Classify a batch, and log the accuracy, which Lightning averages over the epoch."""
        if trainer.sanity_checking:
            return
        x, labels = batch
        right = (self.classify(pl_module, x) == labels).float().mean()
        pl_module.log(self.name, right, on_step=False, on_epoch=True, batch_size=len(labels), sync_dist=True)

    @torch.no_grad()
    def fill(self, module: Any) -> None:
        """Fill a new index with the embeddings of the reference set. ValueError for another metric than "cosine"."""
        made = [(self._embed(module, x.to(module.device)), labels) for x, labels in self.reference]
        vectors = torch.cat([part for part, _ in made])
        if self.index is None or self.index.d != vectors.shape[1]:
            self.index = self._make_index(vectors.shape[1])
        if self.index.metric != "cosine":
            raise ValueError(f"index must return an index with metric 'cosine', got metric {self.index.metric!r}")
        self.index.to(vectors.device).reset()
        self.index.train(vectors)
        self.index.add(vectors)
        self.labels = torch.cat([labels for _, labels in made]).to(vectors.device)

    @torch.no_grad()
    def classify(self, module: Any, x: Tensor) -> Tensor:
        """The classes (Q,) that the neighbours of x (Q, ...) vote for. RuntimeError before `fill`."""
        if self.index is None:
            raise RuntimeError("there is no index yet: it is filled at the start of a validation, or by fill(module)")
        D, I = self.index.search(self._embed(module, x), self.k)
        votes = torch.zeros(len(x), int(self.labels.max()) + 1, device=D.device)
        weights = (D / self.temperature).softmax(1)  # 0 where there is no neighbour
        votes.scatter_add_(1, self.labels[I.clamp(min=0)], weights)
        return votes.argmax(1)


def _called(module: Any, x: Tensor) -> Tensor:
    return module(x)
