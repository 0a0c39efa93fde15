"""Real vectors without a download, for the demo, examples and benchmarks."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from ._optional import require

__all__ = ["photograph_patches"]

_SHAPE = (8, 8, 3)  # of a patch
Vectors = npt.NDArray[np.float32]


def photograph_patches(nb: int = 262_144, nq: int = 19_600, seed: int = 0) -> tuple[Vectors, Vectors]:
    """Real vectors without a download: patches of the two photographs that scikit-learn contains.

    Every 8x8x3 patch (stride 1) of both photographs, 531,720 in all, is numbered row by row; a seeded permutation of
    the numbers gives the base vectors and, after them, the queries.

    Parameters
    ----------
    nb, nq : how many base vectors and queries. No query is also a base vector, but two patches may look the same.
    seed : of `numpy.random.default_rng`.

    Returns base (nb, 192) and queries (nq, 192), float32 in 0..1. Raises ValueError if the photographs hold fewer than
    nb + nq patches, ImportError without scikit-learn or Pillow (extra `demo`).

    >>> base, queries = photograph_patches(nb=100, nq=5)
    >>> base.shape, queries.shape
    ((100, 192), (5, 192))
    """
    require("PIL", "demo")  # scikit-learn reads the photographs with it
    images = require("sklearn.datasets", "demo").load_sample_images().images
    # Views (rows, columns, 8, 8, 3): only the chosen patches are copied.
    patches = [np.lib.stride_tricks.sliding_window_view(image, _SHAPE)[:, :, 0] for image in images]
    ends = np.cumsum([view.shape[0] * view.shape[1] for view in patches])
    if nb < 0 or nq < 0 or nb + nq > ends[-1]:
        raise ValueError(f"nb + nq must be within 0..{ends[-1]:,} patches, got {nb:,} + {nq:,}")
    chosen = np.random.default_rng(seed).permutation(ends[-1])[: nb + nq]
    vectors = np.empty((nb + nq, int(np.prod(_SHAPE))), dtype=np.float32)
    for view, end in zip(patches, ends, strict=True):
        first = end - view.shape[0] * view.shape[1]
        inside = np.flatnonzero((chosen >= first) & (chosen < end))
        row, column = np.divmod(chosen[inside] - first, view.shape[1])
        vectors[inside] = view[row, column].reshape(len(inside), -1)
    vectors /= np.float32(255)
    return vectors[:nb], vectors[nb:]
