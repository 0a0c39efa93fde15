"""Transforms of vectors in front of an index: linear ones and normalisation.

n rows, d_in and d_out dims before and after.
"""

from __future__ import annotations

from typing import Any

import numpy
import torch
from torch import Tensor, nn

from ..functional import kmeans
from ..functional.probe import coarse_of, nearest_lists
from ..index.pre_transform import Normalize
from .arrays import Unsupported, device_of, missing, returned, rows
from .vectors import Vector

_CPU = torch.device("cpu")


class VectorTransform:
    """The base class: `module` maps (n, d_in) to (n, d_out) once it is trained, None before."""

    module: Any = None
    __getattr__ = missing

    def __init__(self, d_in: int, d_out: int) -> None:
        self.d_in, self.d_out = d_in, d_out

    @property
    def is_trained(self) -> bool:
        """Whether vectors can be transformed. Setting it has no effect."""
        return self.module is not None

    @is_trained.setter
    def is_trained(self, value: bool) -> None:
        pass

    def train(self, x: Any) -> None:
        """Fit to x (n, d_in)."""
        self.fit(rows(x, self.d_in, device_of(x)).float().cpu())

    def fit(self, x: Tensor) -> None:
        """Fit to x (n, d_in)."""

    def apply(self, x: Any) -> Any:
        """x (n, d_in) transformed, (n, d_out)."""
        if not self.is_trained:
            raise RuntimeError(f"{type(self).__name__} is not trained: call train(x) first")
        given = rows(x, self.d_in, device_of(x))
        with torch.no_grad():
            return returned(self.module.to(given.device)(given.float()), x)

    apply_py = apply

    def reverse_transform(self, x: Any) -> Any:
        """x (n, d_out) back to (n, d_in), where that can be done."""
        return returned(self.back(rows(x, self.d_out, device_of(x)).float()), x)

    def back(self, x: Tensor) -> Tensor:
        """`reverse_transform` of a tensor."""
        raise RuntimeError(f"reverse_transform is not implemented for {type(self).__name__}")


class NormalizationTransform(VectorTransform):
    """Scales vectors to unit L2 norm.

    >>> NormalizationTransform(2).apply(numpy.array([[3.0, 4.0]]))
    array([[0.6, 0.8]], dtype=float32)
    """

    def __init__(self, d: int, norm: float = 2.0) -> None:
        super().__init__(d, d)
        if norm != 2.0:
            raise Unsupported(f"faiss_compat normalises by the L2 norm, norm = 2.0, got {norm}")
        self.norm, self.module = norm, Normalize()

    def back(self, x: Tensor) -> Tensor:
        """x itself, as in faiss."""
        return x


class LinearTransform(VectorTransform):
    """x @ A.T + b. Set `A` (d_out, d_in) and, with `have_bias`, `b` (d_out,); or use a subclass that fits them.

    >>> transform = LinearTransform(2, 1)
    >>> transform.A = numpy.array([[1.0, 2.0]])
    >>> transform.apply(numpy.array([[1.0, 1.0]]))
    array([[3.]], dtype=float32)
    """

    is_orthonormal = False

    def __init__(self, d_in: int, d_out: int, have_bias: bool = False) -> None:
        super().__init__(d_in, d_out)
        self.have_bias = have_bias

    def set(self, matrix: Tensor, bias: Tensor | None) -> None:
        """Take matrix (d_out, d_in) and bias (d_out,); is_orthonormal then says whether they can be undone."""
        self.module = nn.Linear(self.d_in, self.d_out, bias is not None, device=_CPU, dtype=torch.float32)
        self.module.requires_grad_(False).load_state_dict(
            {"weight": matrix.float(), **({} if bias is None else {"bias": bias.float()})}
        )
        eye = torch.eye(self.d_out, dtype=torch.float32, device=_CPU)
        self.is_orthonormal = bool(torch.allclose(self.module.weight @ self.module.weight.T, eye, atol=1e-3))

    @property
    def A(self) -> Any:
        """The matrix, flattened (d_out * d_in,) float32; empty before training. Assign an array to set it."""
        weight = numpy.zeros(0, "float32") if self.module is None else self.module.weight.cpu().numpy()
        return Vector(weight.reshape(-1), self._set_matrix)

    @A.setter
    def A(self, value: Any) -> None:
        self._set_matrix(value)

    @property
    def b(self) -> Any:
        """The bias (d_out,) float32; empty if there is none. Assign an array to set it, after `A`."""
        bias = None if self.module is None else self.module.bias
        return Vector(numpy.zeros(0, "float32") if bias is None else bias.cpu().numpy(), self._set_bias)

    @b.setter
    def b(self, value: Any) -> None:
        self._set_bias(value)

    def set_is_orthonormal(self) -> None:
        """Nothing: `is_orthonormal` follows `A`."""

    def _set_matrix(self, value: Any) -> None:
        matrix = torch.from_numpy(numpy.array(value, dtype="float32").reshape(self.d_out, self.d_in))
        self.set(matrix, torch.zeros(self.d_out, device=_CPU) if self.have_bias else None)

    def _set_bias(self, value: Any) -> None:
        if self.module is None:
            raise RuntimeError("set A before b")
        self.have_bias = True
        self.set(self.module.weight, torch.from_numpy(numpy.array(value, dtype="float32").reshape(self.d_out)))

    def back(self, x: Tensor) -> Tensor:
        """(x - b) @ A, where A has orthonormal rows. RuntimeError otherwise."""
        if not self.is_orthonormal:
            raise RuntimeError(f"reverse_transform of {type(self).__name__} needs a matrix with orthonormal rows")
        layer = self.module.to(x.device)
        return (x if layer.bias is None else x - layer.bias) @ layer.weight


class PCAMatrix(LinearTransform):
    """The d_out principal components; each times its eigenvalue, a sum of squares, to the power of `eigen_power`.

    >>> x = numpy.random.RandomState(0).rand(100, 4)
    >>> pca = PCAMatrix(4, 2)
    >>> pca.train(x)
    >>> bool(abs(pca.apply(x).mean(0)).max() < 1e-6)
    True
    """

    def __init__(self, d_in: int, d_out: int, eigen_power: float = 0.0, random_rotation: bool = False) -> None:
        super().__init__(d_in, d_out, True)
        if d_out > d_in:
            raise RuntimeError(f"d_out must be <= d_in = {d_in}, got {d_out}")
        self.eigen_power, self.random_rotation = eigen_power, random_rotation
        self.epsilon = 0.0  # added to the eigenvalues before they are raised to a power
        self.mean = self.eigenvalues = Vector(numpy.zeros(0, "float32"))

    def fit(self, x: Tensor) -> None:
        """Fit to x (n, d_in)."""
        if x.shape[0] < 2:
            raise RuntimeError(f"PCA needs at least 2 rows, got {x.shape[0]}")
        mean = x.double().mean(0)
        centred = x.double() - mean
        values, vectors = torch.linalg.eigh(centred.T @ centred)
        values, matrix = values.flip(0).clamp(min=0), vectors.flip(1).T[: self.d_out]
        self.mean, self.eigenvalues = Vector(mean.float().numpy()), Vector(values.float().numpy())
        if self.eigen_power:
            matrix = matrix * (values[: self.d_out, None] + self.epsilon) ** self.eigen_power
        if self.random_rotation:
            matrix = _rotation(self.d_out, self.d_out, 5).double() @ matrix
        self.set(matrix, -(matrix @ mean))


class RandomRotationMatrix(LinearTransform):
    """A random rotation, or a matrix with orthonormal rows or columns where d_out differs from d_in."""

    def __init__(self, d_in: int, d_out: int) -> None:
        super().__init__(d_in, d_out)

    def init(self, seed: int) -> None:
        """Draw the matrix."""
        self.set(_rotation(self.d_out, self.d_in, seed), None)

    def fit(self, x: Tensor) -> None:
        """Draw the matrix; x is not used."""
        self.init(12345)


class CenteringTransform(LinearTransform):
    """Subtracts the mean of the training vectors."""

    def __init__(self, d: int) -> None:
        super().__init__(d, d, True)

    def fit(self, x: Tensor) -> None:
        """Fit to x (n, d)."""
        self.set(torch.eye(self.d_in, device=_CPU), -x.double().mean(0))


class OPQMatrix(LinearTransform):
    """The rotation that minimises the error of a product quantizer with M parts: Ge et al., Optimized Product
    Quantization (2013), the non-parametric form, by alternating k-means of each part and an orthogonal Procrustes."""

    niter = 10
    niter_pq = 4
    ncentroids = 256

    def __init__(self, d: int, M: int = 1, d2: int = -1) -> None:
        super().__init__(d, d if d2 == -1 else d2)
        if self.d_out % M:
            raise RuntimeError(f"M must divide d2 = {self.d_out}, got {M}")
        self.M = M

    def fit(self, x: Tensor) -> None:
        """Fit to at most 65,536 rows of x (n, d_in)."""
        x = x[: 1 << 16] - x[: 1 << 16].mean(0)
        most = min(self.ncentroids, x.shape[0])
        rotation = _rotation(self.d_out, self.d_in, 1234)
        for _ in range(self.niter):
            decoded = torch.cat([self._decoded(part, most) for part in (x @ rotation.T).chunk(self.M, 1)], 1)
            u, _, vh = torch.linalg.svd(decoded.T @ x, full_matrices=False)
            rotation = u @ vh
        self.set(rotation, None)

    def _decoded(self, part: Tensor, most: int) -> Tensor:
        """The nearest of `most` centroids of each row of one part."""
        centroids, _ = kmeans(part, most, niter=self.niter_pq)
        return centroids[nearest_lists(part, coarse_of(centroids, "l2"), "l2")]


def _rotation(rows: int, columns: int, seed: int) -> Tensor:
    """A random matrix with orthonormal rows or columns."""
    generator = torch.Generator(device="cpu").manual_seed(seed)
    more, fewer = max(rows, columns), min(rows, columns)
    q = torch.linalg.qr(torch.randn(more, fewer, generator=generator, dtype=torch.float32, device=_CPU))[0]
    return q if rows >= columns else q.T
