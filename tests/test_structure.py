"""What keeps the code small and readable, counted: classes above an index, calls of a search, private names."""

from __future__ import annotations

import ast
import sys
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch

import torch_ivf_module
from torch_ivf_module import IndexIVFFlat, ShardedIndex, native
from torch_ivf_module.index.base import IndexBase

from .kinds import KINDS

ROOT = Path(torch_ivf_module.__file__).parent
CLASSES, CALLS, FRAMES = 3, 60, 10  # at most
# Names with an underscore that are part of an interface: of named tuples, of torch.nn.Module for its subclasses, and of
# DistributedDataParallel.
INTERFACES = {
    "_replace",
    "_fields",
    "_asdict",
    "_apply",
    "_buffers",
    "_version",
    "_ddp_params_and_buffers_to_ignore",
    "_set_params_and_buffers_to_ignore_for_model",
    "_load_state_dict_pre_hooks",
    "_non_persistent_buffers_set",
    "_version_token",
}


def own_classes(kind: type) -> list[type]:
    return [part for part in kind.__mro__ if part.__module__.partition(".")[0] == ROOT.name]


@pytest.mark.parametrize("kind", [*IndexBase.__subclasses__(), *torch_ivf_module.IndexFlat.__subclasses__(), ShardedIndex])
def test_few_classes_above_an_index(kind):
    if kind.__module__.startswith(ROOT.name):
        assert len(own_classes(kind)) <= CLASSES, own_classes(kind)


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


@pytest.mark.parametrize("kind", KINDS)
def test_a_search_makes_few_calls(kind):
    if not native.available():
        pytest.skip("counted for the kernel")
    index = kind()
    query = torch.zeros(1, index.d)
    index.search(query, 3)
    names, deepest = calls_and_frames(lambda: index.search(query, 3))
    assert len(names) <= CALLS, names
    assert deepest <= FRAMES, names


def private_accesses(tree: ast.AST) -> list[str]:
    """Attributes with a leading underscore that are read of anything but self, cls, super() and modules of torch."""
    found = []
    for node in ast.walk(tree):
        if not isinstance(node, ast.Attribute) or not node.attr.startswith("_") or node.attr.startswith("__"):
            continue
        owner = ast.unparse(node.value)
        if owner in ("self", "cls", "super()", "ctx") or owner.split(".")[0] == "torch" or node.attr in INTERFACES:
            continue
        found.append(f"{owner}.{node.attr}")
    return found


@pytest.mark.parametrize(
    "file", [file for file in sorted(ROOT.rglob("*.py")) if file.parent.name != "index"], ids=lambda file: file.stem
)
def test_private_attributes_of_an_index_are_used_in_index_only(file):
    assert private_accesses(ast.parse(file.read_text())) == []


def test_the_checker_sees_private_accesses():
    assert private_accesses(ast.parse("index._lock, self.index._raw('x'), self._own, torch._C._x, a._replace()")) == [
        "index._lock",
        "self.index._raw",
    ]


def test_settings_of_an_index_are_not_shared():
    first, second = IndexIVFFlat(4, nlist=2), IndexIVFFlat(4, nlist=2)
    first.nprobe = 1
    assert second.nprobe == 2
