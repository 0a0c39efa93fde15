"""Settings of one search."""

from __future__ import annotations

from typing import Any

from .arrays import missing
from .selectors import IDSelector


class SearchParameters:
    """Settings of one search: `sel` says which ids may be found.

    Attributes that do not exist cannot be given or set.
    """

    sel: IDSelector | None = None
    __getattr__ = missing

    def __init__(self, **settings: Any) -> None:
        for name, value in settings.items():
            setattr(self, name, value)

    def __setattr__(self, name: str, value: Any) -> None:
        if not hasattr(type(self), name):
            raise AssertionError(f"{type(self).__name__} has no {name}")
        super().__setattr__(name, value)


class SearchParametersIVF(SearchParameters):
    """Settings of one search of an inverted file.

    >>> SearchParametersIVF(nprobe=4).max_codes
    0
    """

    nprobe: int = 1
    max_codes: int = 0
    quantizer_params: Any = None


class SearchParametersPreTransform(SearchParameters):
    """Settings of one search behind transforms: those of the index there."""

    index_params: SearchParameters | None = None
