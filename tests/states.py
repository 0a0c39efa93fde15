"""Copies and comparisons of the state of an index: its tensors and its settings."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor


def snapshot(module: torch.nn.Module) -> dict[str, Tensor]:
    """A copy of a module's state_dict."""
    return {name: value.detach().clone() for name, value in module.state_dict().items()}


def same_state(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    """Whether two state_dicts have the same keys, dtypes and values."""
    return one.keys() == other.keys() and all(
        value.dtype == other[name].dtype and torch.equal(value, other[name]) for name, value in one.items()
    )


SETTINGS = (
    "d",
    "k",
    "metric",
    "nprobe",
    "nlist",
    "ntotal",
    "is_trained",
    "max_codes",
    "search_mode",
    "max_bytes",
)


def settings_of(index: Any) -> dict[str, Any]:
    """The public settings of an index, without its tensors."""
    return {name: getattr(index, name) for name in SETTINGS if hasattr(index, name)}


@contextmanager
def unchanged(index: Any) -> Iterator[None]:
    """Assert that the block does not change the tensors or settings of `index`."""
    before, settings = snapshot(index), settings_of(index)
    yield
    assert same_state(before, snapshot(index))
    assert settings == settings_of(index)
