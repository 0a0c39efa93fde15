"""The vectors of C++ that are attributes of faiss's objects, as arrays with a few methods.

n entries.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy

from .arrays import Unsupported


class Vector:
    """An array (n,) with `size` and `at`; `vector_to_array` gives the array, `copy_array_to_vector` replaces it.

    >>> Vector(numpy.arange(3)).at(2)
    2
    """

    def __init__(self, array: Any, assign: Callable[[Any], None] | None = None) -> None:
        self._array, self._assign = array, assign

    def size(self) -> int:
        """The number of entries."""
        return len(self._array)

    def at(self, number: int) -> Any:
        """An entry."""
        return self._array[number].item()

    def data(self) -> Any:
        """The array, where `swig_ptr` is an array too."""
        return self._array

    def assign(self, array: Any) -> None:
        """Replace the entries; `Unsupported` where they are not the owner's to take."""
        if self._assign is None:
            raise Unsupported("faiss_compat does not let this vector be replaced")
        self._assign(array)

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> Any:
        return numpy.array(self._array, dtype=dtype)

    def __len__(self) -> int:
        return len(self._array)


def vector_to_array(v: Any) -> Any:
    """A vector of C++ as an array (n,) of one's own."""
    return numpy.array(v)


vector_float_to_array = vector_to_array


def copy_array_to_vector(a: Any, v: Vector) -> None:
    """Replace the entries of a vector of C++ by those of an array (n,).

    >>> from torch_ivf_module.faiss_compat import LinearTransform
    >>> transform = LinearTransform(2, 1)
    >>> copy_array_to_vector(numpy.array([1.0, 2.0], "float32"), transform.A)
    >>> transform.apply(numpy.array([[1.0, 1.0]]))
    array([[3.]], dtype=float32)
    """
    v.assign(a)


def swig_ptr(a: Any) -> Any:
    """A pointer to an array: here the array."""
    return a


def rev_swig_ptr(ptr: Any, n: int) -> Any:
    """The first n entries of an array behind a pointer, which is the array here."""
    return ptr[:n]
