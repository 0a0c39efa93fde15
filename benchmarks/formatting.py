"""How a figure is written in a table, and how a table is written in Markdown."""

from collections.abc import Iterable, Sequence

NONE = "–"


def grid(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table; every column but the first is aligned to the right."""
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def number(value: float) -> str:
    return f"{value:,.3g}"


def count(value: float) -> str:
    return f"{value:,.0f}"


def speed(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def times(value: float) -> str:
    """A ratio."""
    if value >= 10:
        return f"{value:.0f}×" if value >= 100 else f"{value:.3g}×"
    return f"{value:.2f}×" if value >= 0.1 else f"{value:.2g}×"
