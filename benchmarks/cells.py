"""How tables are written: their shape, and how a figure reads in one."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from statistics import median
from typing import Any

__all__ = ["NONE", "grid", "middle", "number", "over", "speed", "times"]

NONE = "–"


def grid(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table; every column but the first is set to the right."""
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def middle(rows: Iterable[dict[str, Any]], name: str) -> float | None:
    values = [row[name] for row in rows if row.get(name) is not None]
    return median(values) if values else None


def number(value: float | None, form: str = "{:,.3g}") -> str:
    return NONE if value is None else form.format(value)


def speed(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def times(value: float | None) -> str:
    if value is None:
        return NONE
    if value >= 10:
        return f"{value:.0f}×" if value >= 100 else f"{value:.3g}×"
    return f"{value:.2f}×" if value >= 0.1 else f"{value:.2g}×"


def over(mine: float | None, theirs: float | None) -> float | None:
    return mine / theirs if mine is not None and theirs else None
