"""Arrays in a file: their names and shapes, and how their rows are read."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from .._files import readable

__all__ = ["Array", "BadData", "Contents", "checked", "listed", "reading"]

Found = TypeVar("Found")


class BadData(ValueError):
    """A file that does not hold the array that is asked for, or is damaged; the text says why."""


class Array(NamedTuple):
    """An array in a file."""

    shape: tuple[int, ...]
    kind: str  # of its numbers, as numpy's dtype.kind; "?" of what is no number
    read: Callable[[int, int], Any]  # rows start:end, as a numpy array or a tensor
    unreadable: str = ""  # why it cannot be read, and what would work


class Contents(NamedTuple):
    """All arrays in a file."""

    arrays: dict[str, Array]  # by name; the only one of a file without names is called ""
    metric: str | None = None  # of its neighbours, where the file says; a name of its own if it is not one of ours

    def choose(
        self, path: Path, fits: Callable[[Array], bool], key: str | None, roles: Iterable[str], what: str
    ) -> str:
        """The name of the array that is meant: `key`, else the only one that `fits`, else the one that has a role.

        A role is the last part of a name: "train" is also "glove/train". BadData asks for --key, or says `what` the
        file must hold.
        """
        if key is not None:
            if key not in self.arrays:
                hint = ": leave --key out" if "" in self.arrays else ""
                raise BadData(f"{path} holds no {key!r}, but {listed(self.arrays)}{hint}")
            return key
        fitting = [name for name, array in self.arrays.items() if fits(array)]
        for role in roles:
            named = [role] if role in fitting else [name for name in fitting if name.rpartition("/")[2] == role]
            if len(named) == 1:
                return named[0]
        if len(fitting) == 1:
            return fitting[0]
        if not fitting:
            raise BadData(f"{path} must hold {what}, got {listed(self.arrays)}")
        raise BadData(f"{path} holds {listed(fitting)}: say which with --key")


def checked(name: str, array: Array) -> Array:
    """`array`, if it can be read; errors while it is read become BadData, which name it by `name`."""
    if array.unreadable:
        raise BadData(f"{name} {array.unreadable}")
    return array._replace(read=lambda start, end: reading(name, lambda: array.read(start, end)))


def reading(name: str, read: Callable[[], Found]) -> Found:
    """The result of `read`, whose errors become BadData."""
    return readable(read, BadData, f"{name} cannot be read")


def listed(names: Iterable[str]) -> str:
    """Names for an error."""
    return ", ".join(repr(name) if name else "one array without a name" for name in names) or "no array"
