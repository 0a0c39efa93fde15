"""This package under the name faiss, for libraries that import that."""

from __future__ import annotations

import sys

from . import arrays

NAME = "faiss"


def install() -> None:
    """Make ``import faiss`` import this package, in this process. RuntimeError if the real faiss is imported already.

    Call it before importing libraries that look for faiss.
    """
    package = sys.modules[__package__]
    loaded = sys.modules.get(NAME)
    if loaded is package:
        return
    if loaded is not None:
        where = getattr(loaded, "__file__", None) or "no file"
        raise RuntimeError(f"faiss is imported already, from {where}: call install() before anything imports it")
    sys.modules[NAME] = package
    sys.modules[f"{NAME}.contrib"] = sys.modules[f"{__package__}.contrib"]


def uninstall() -> None:
    """Undo `install`: the next ``import faiss`` looks for the real one. What imported this package keeps it."""
    if not installed():
        return
    for name in [name for name in sys.modules if name == NAME or name.startswith(f"{NAME}.")]:
        del sys.modules[name]
    arrays.use_tensors(False)


def installed() -> bool:
    """Whether ``import faiss`` gives this package."""
    return sys.modules.get(NAME) is sys.modules[__package__]
