"""What is in an index, as arrays.

n rows of a list.
"""

from __future__ import annotations

from typing import Any

import numpy

from torch_ivf_module.faiss_compat.transforms import LinearTransform


def get_invlist(invlists: Any, l: int) -> tuple[Any, Any]:
    """The ids (n,) and codes (n, code_size) uint8 of list l."""
    return invlists.get_ids(l), invlists.get_codes(l).reshape(-1, invlists.code_size)


def get_invlist_sizes(invlists: Any) -> Any:
    """The number of vectors in each list, (nlist,) int64."""
    return numpy.array([invlists.list_size(l) for l in range(invlists.nlist)], dtype="int64")


def get_flat_data(index: Any) -> Any:
    """The vectors (N, d) float32 of a flat index."""
    return index.get_xb().reshape(index.ntotal, index.d)


def get_LinearTransform_matrix(pca: Any) -> tuple[Any, Any]:
    """The matrix (d_out, d_in) and the bias (d_out,) of a linear transform, None if it has no bias."""
    return numpy.array(pca.A).reshape(pca.d_out, pca.d_in), numpy.array(pca.b) if pca.have_bias else None


def make_LinearTransform_matrix(A: Any, b: Any = None) -> Any:
    """The linear transform of a matrix (d_out, d_in) and a bias (d_out,)."""
    transform = LinearTransform(A.shape[1], A.shape[0], b is not None)
    transform.A = A
    if b is not None:
        transform.b = b
    return transform
