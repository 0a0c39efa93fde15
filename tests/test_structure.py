"""What keeps the code small and readable, counted: classes above an index, calls of a search, private names."""

from __future__ import annotations

import ast
import functools
import sys
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
from torch import nn

import torch_ivf_module
from tests.datasets import PLAIN
from tests.kinds import KINDS
from torch_ivf_module import IndexIVFFlat, native

ROOT = Path(torch_ivf_module.__file__).parent
CLASSES, CALLS, FRAMES = 3, 40, 8  # at most

def own_classes(kind: type) -> list[type]:
    return [part for part in kind.__mro__ if part.__module__.partition(".")[0] == ROOT.name]


@pytest.mark.parametrize("name", [name for name in torch_ivf_module.__all__ if name.startswith(("Index", "Sharded"))])
def test_few_classes_above_an_index(name):
    classes = own_classes(getattr(torch_ivf_module, name))
    assert len(classes) <= CLASSES, classes


def calls_and_frames(call: Any) -> tuple[list[str], int]:
    """The Python functions that a call enters, and the depth that they reach below the caller."""
    names: list[str] = []
    depth = deepest = 0

    def note(frame: FrameType, event: str, _: object) -> None:
        nonlocal depth, deepest
        if event == "call":
            depth += 1
            deepest = max(deepest, depth)
            names.append(f"{Path(frame.f_code.co_filename).name}:{frame.f_code.co_name}")
        elif event == "return":
            depth -= 1

    sys.setprofile(note)
    try:
        call()
    finally:
        sys.setprofile(None)
    return names, deepest


@pytest.mark.parametrize("kind", ["ivf", "flat"])  # which the kernel searches
def test_a_search_makes_few_calls(kind):
    if not native.available():
        pytest.skip("counted for the kernel")
    index, _, queries = KINDS[kind](PLAIN)
    query = queries[:1].clone()
    index.search(query, 3)
    names, deepest = calls_and_frames(functools.partial(index.search, query, 3))
    assert len(names) <= CALLS, names
    assert deepest <= FRAMES, names


def private_names() -> set[str]:
    """Attributes of an index and of its store with a leading underscore that torch.nn.Module does not have."""
    index = IndexIVFFlat(2, nlist=1)
    names = {*dir(index), *dir(index.store)}
    return {name for name in names if name.startswith("_") and not hasattr(nn.Module(), name)}


def accesses(tree: ast.AST, names: set[str]) -> list[str]:
    """Where attributes of these names are read of something other than self."""
    nodes = [node for node in ast.walk(tree) if isinstance(node, ast.Attribute) and node.attr in names]
    return [ast.unparse(node) for node in nodes if ast.unparse(node.value) not in ("self", "cls")]


OUTSIDE = [file for file in sorted(ROOT.rglob("*.py")) if file.parent.name != "index"]


@pytest.mark.parametrize("file", OUTSIDE, ids=lambda file: str(file.relative_to(ROOT)))
def test_private_attributes_of_an_index_are_used_in_index_only(file):
    assert accesses(ast.parse(file.read_text()), private_names()) == []


def test_the_checker_sees_private_attributes():
    assert {"_k", "_flat", "_updates", "_integrity"} <= private_names()
    tree = ast.parse("index._k, self.index.store._updates, self._k, values._replace()")
    assert accesses(tree, private_names()) == ["index._k", "self.index.store._updates"]
