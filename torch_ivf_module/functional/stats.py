"""Counters of a search, which users see as `last_search_stats`. Q queries, P probes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .lists import InvertedLists
from .options import Probes

Stats = dict[str, Any]
_COUNTERS = ("lists_read", "rows_read", "rows_left_out", "rows_scored", "certified", "searched_again")


def start_stats(stats: Stats, queries: int, nprobe: int) -> None:
    """Set every counter to zero."""
    stats.update(queries=queries, nprobe=nprobe, mode=None, why="nothing to read")
    stats.update(dict.fromkeys(_COUNTERS, 0))


def add_stats(stats: Stats, more: Stats) -> None:
    """Add the counters of a further search for the same queries; the rest stays as the first search has recorded it."""
    if not stats:
        stats.update(more)
        return
    if stats["mode"] is None:
        stats.update(mode=more["mode"], why=more["why"])
    for name in _COUNTERS:
        known = None not in (stats[name], more[name])
        stats[name] = stats[name] + more[name] if known else None


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
