"""k-means with faiss's interface.

n rows, d dim, k centroids.
"""

from __future__ import annotations

import warnings
from typing import Any

import numpy
import torch
from torch import Tensor

from ..functional import kmeans
from .arrays import Unsupported, faiss_errors, returned, rows
from .base import Index
from .constants import metric_name
from .flat import IndexFlatIP, IndexFlatL2
from .vectors import Vector, vector_to_array


class ClusteringParameters:
    """Settings of k-means. Settings of faiss that are not here raise an error; `verbose` has no effect."""

    niter = 25
    nredo = 1
    verbose = False
    spherical = False
    seed = 1234
    max_points_per_centroid = 256
    min_points_per_centroid = 39

    def __setattr__(self, name: str, value: Any) -> None:
        if not hasattr(type(self), name):
            known = ", ".join(name for name in vars(ClusteringParameters) if not name.startswith("_"))
            raise Unsupported(f"faiss_compat has no setting {name!r} of k-means; it has {known}")
        super().__setattr__(name, value)


class Clustering(ClusteringParameters):
    """k-means of vectors (n, d); the index given to `train` holds the centroids afterwards.

    >>> clustering = Clustering(2, 2)
    >>> clustering.min_points_per_centroid = 1
    >>> clustering.train(numpy.array([[0.0, 0.0], [0.0, 2.0], [9.0, 9.0], [9.0, 7.0]]), IndexFlatL2(2))
    >>> sorted(vector_to_array(clustering.centroids).tolist())
    [0.0, 1.0, 8.0, 9.0]
    """

    d = k = 0
    start: Any = None  # (k * d,) float32, if `centroids` was set before `train`
    iteration_stats: Any = ()

    def __init__(self, d: int, k: int, cp: ClusteringParameters | None = None) -> None:
        for name, value in vars(cp or ClusteringParameters()).items():
            setattr(self, name, value)
        self.d, self.k = d, k

    @property
    def centroids(self) -> Vector:
        """The centroids, flattened (k * d,) float32; where to start, if set before `train`."""
        return Vector(numpy.zeros(0, "float32") if self.start is None else self.start, self._set_centroids)

    @centroids.setter
    def centroids(self, value: Any) -> None:
        self._set_centroids(value)

    def _set_centroids(self, value: Any) -> None:
        self.start = numpy.array(value, dtype="float32").reshape(-1)

    def train(self, x: Any, index: Index, weights: Any = None) -> None:
        """Fit centroids to x (n, d), assigning vectors by the metric of `index`."""
        if weights is not None:
            raise Unsupported("faiss_compat has no weights in k-means; leave them out")
        metric = "ip" if self.spherical else metric_name(index.metric_type)
        with faiss_errors():
            x = rows(x, self.d, index.device)
            tries = [self._fitted(x, metric, self.seed + number) for number in range(self.nredo)]
        least = self.min_points_per_centroid * self.k
        if x.shape[0] < least:
            warnings.warn(f"{x.shape[0]} training rows for {self.k} centroids: give at least {least}", stacklevel=2)
        best = min(tries, key=lambda fit: float(fit[1][-1]) * (1 if metric == "l2" else -1)) if self.niter else tries[0]
        centroids, objective = best
        self.centroids = centroids.cpu().numpy()
        self.iteration_stats = Stats({"obj": float(value)} for value in objective)
        index.reset()
        index.add(centroids)

    def _fitted(self, x: Tensor, metric: str, seed: int) -> tuple[Tensor, Tensor]:
        start = None if self.start is None else torch.from_numpy(self.start).view(-1, self.d).to(x.device)
        most = self.max_points_per_centroid
        return kmeans(
            x, self.k, niter=self.niter, metric=metric, max_points_per_centroid=most, seed=seed, start=start
        )


class Kmeans:
    """k-means of vectors (n, d): the centroids (k, d) and objectives as arrays.

    >>> x = numpy.random.RandomState(0).rand(200, 4)
    >>> found = Kmeans(4, 3, niter=5)
    >>> bool(found.train(x) == found.obj[-1])
    True
    >>> found.centroids.shape
    (3, 4)
    """

    def __init__(self, d: int, k: int, **settings: Any) -> None:
        self.d, self.k, self.gpu = d, int(k), settings.pop("gpu", False)
        self.cp = ClusteringParameters()
        for name, value in settings.items():
            setattr(self.cp, name, value)
        self.index: Index = IndexFlatIP(d) if self.cp.spherical else IndexFlatL2(d)
        if self.gpu:
            self.index.module.to("cuda")
        self.reset()

    def reset(self, k: int | None = None) -> None:
        """Forget the centroids, to train again, with another k if given."""
        self.k = self.k if k is None else int(k)
        self.centroids: Any = None
        self.obj: Any = None
        self.iteration_stats: Any = None

    def train(self, x: Any, weights: Any = None, init_centroids: Any = None) -> float:
        """Fit centroids to x (n, d), from `init_centroids` (k, d) if given; the last objective."""
        clustering = Clustering(self.d, self.k, self.cp)
        if init_centroids is not None:
            clustering.centroids = rows(init_centroids, self.d, torch.device("cpu")).float().numpy()
        clustering.train(x, self.index, weights)
        self.iteration_stats = list(clustering.iteration_stats)
        self.obj = numpy.array([stats["obj"] for stats in self.iteration_stats])
        found = torch.from_numpy(vector_to_array(clustering.centroids).reshape(self.k, self.d))
        self.centroids = returned(found, x)
        return float(self.obj[-1]) if self.obj.size else 0.0

    def assign(self, x: Any) -> tuple[Any, Any]:
        """The distance (n,) to the nearest centroid of each x (n, d), and its number (n,)."""
        if self.centroids is None:
            raise AssertionError("train the centroids before assigning vectors to them")
        D, I = self.index.search(x, 1)
        return D.ravel(), I.ravel()


class Stats(list[dict[str, float]]):
    """One entry for each iteration; `size` and `at` as a vector of faiss has them."""

    def size(self) -> int:
        """The number of iterations."""
        return len(self)

    def at(self, number: int) -> Any:
        """The entry of an iteration, its values as attributes."""
        return type("Stats", (), self[number])
