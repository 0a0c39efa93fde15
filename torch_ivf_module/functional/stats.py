"""Counters of a search, which users see as `last_search_stats`. Q queries, P probes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .lists import InvertedLists
from .options import Probes

Stats = dict[str, Any]


def start_stats(stats: Stats, queries: int, nprobe: int) -> None:
    """Set every counter to zero."""
    stats.update(queries=queries, nprobe=nprobe, mode=None, why="nothing to read")
    stats.update(lists_read=0, rows_read=0, rows_left_out=0, rows_scored=0, certified=0, searched_again=0)


def record_mode(stats: Stats | None, mode: str, why: str) -> None:
    """Record how the first segment that has rows was scanned, and why so."""
    if stats is not None and stats["mode"] is None:
        stats.update(mode=mode, why=why)


def count_rows(stats: Stats, lists: InvertedLists, probes: Probes) -> None:
    """Add the lists and rows that the queries read of one segment. Synchronizes with the device."""
    sizes = probes.sizes(lists)
    stats["lists_read"] += int((sizes > 0).sum())
    stats["rows_read"] += int(sizes.sum())
    stats["rows_left_out"] += int((lists.sizes[probes.lists] - sizes).sum())


def count_scored(stats: Stats | None, rows: Tensor) -> None:
    """Add the rows (Q, K) that are scored exactly, -1 for none. Synchronizes with the device."""
    if stats is not None:
        stats["rows_scored"] += int(torch.count_nonzero(rows >= 0))


def count_certified(stats: Stats, second_pass: Sequence[Tensor]) -> None:
    """Add the queries that took a second pass in any segment, bool (Q,) each, and the others.

    Synchronizes with the device.
    """
    count = int(torch.stack(list(second_pass)).any(0).sum())
    stats["searched_again"] += count
    stats["certified"] += second_pass[0].shape[0] - count
