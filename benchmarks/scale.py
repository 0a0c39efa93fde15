"""The tables of docs/scale.md, from scale.jsonl, which
``python -m tests.build_larger_than_memory --results benchmarks/scale.jsonl`` appends to.

N vectors, L lists, d dim, S rows to train on.
"""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any, NamedTuple

from torch_ivf_module.functional.codec import PANEL, panel_bytes
from torch_ivf_module.functional.row_codes import width
from torch_ivf_module.streaming.plan import least_memory

from .tables import grid

STORED = Path(__file__).with_name("scale.jsonl")
PAGE = Path(__file__).parents[1] / "docs" / "scale.md"
_MARKED = re.compile(r"(<!-- (\w+):begin -->\n).*?(<!-- \2:end -->)", re.DOTALL)
SIZES = (10**7, 10**8, 10**9)
D, NPROBE, NITER = 128, 16, 10
Line = dict[str, Any]


class Rates(NamedTuple):
    """Of the machine of the last build by one process and of its search."""

    training: float  # multiplications and additions a second
    assigning: float
    writing: float  # bytes a second
    searching: float  # numbers a second of the rows in the probed lists, one query at a time, warm


def lines() -> list[Line]:
    """What was measured."""
    return [json.loads(line) for line in STORED.read_text(encoding="utf-8").splitlines()]


def rates(measured: list[Line]) -> Rates:
    """The rates of the last build by one process, and of the search of its file."""
    at = max(number for number, line in enumerate(measured) if line["part"] == "build" and line["processes"] == 1)
    build, search = measured[at], next(line for line in measured[at:] if line["part"] == "search")
    n, d, nlist, seconds = build["n"], build["d"], build["nlist"], build["seconds"]
    return Rates(
        2 * build["trained_on"] * nlist * d * build["niter"] / seconds["train"],
        2 * n * nlist * d / seconds["assign"],
        build["bytes"] / seconds["write"],
        search["queries_per_second"]["one query at a time, warm"] * search["rows_read"] * d,
    )


def built(measured: list[Line]) -> str:
    """A table of the builds."""
    head = ["vectors", "processes", "memory allowed", "taken", "train, assign, write", "MB/s", "CPU, threads"]
    rows = [
        [
            f"{line['n']:,} × {line['d']}, {gb(4 * line['n'] * line['d'])}", str(line["processes"]),
            gb(line["allowed"]), gb(line["resident"]),
            ", ".join(f"{line['seconds'][step]:.0f}" for step in ("train", "assign", "write")) + " s",
            f"{4e-6 * line['n'] * line['d'] / line['total']:.0f}", f"{line['cpu']}, {line['threads']}",
        ]
        for line in measured if line["part"] == "build"
    ]  # fmt: skip
    return grid(head, rows)


def searched(measured: list[Line]) -> str:
    """A table of the searches."""
    found = [line for line in measured if line["part"] == "search"]
    names = list(found[0]["queries_per_second"])
    head = ["vectors", "memory allowed", "taken", *(f"queries/s: {name}" for name in names)]
    return grid(head, (
        [f"{line['n']:,} × {line['d']}", gb(line["allowed"]), gb(line["resident"]),
         *(f"{line['queries_per_second'][name]:,.0f}" for name in names)]
        for line in found
    ))  # fmt: skip


def planned(measured: list[Line]) -> str:
    """What indexes of SIZES take, by the formulas of the page and the measured rates."""
    rate = rates(measured)
    head = ["", *(f"10^{round(math.log10(n))}" for n in SIZES)]
    rows: dict[str, list[str]] = {}

    def add(name: str, value: str) -> None:
        rows.setdefault(name, []).append(value)

    for n in SIZES:
        nlist = round(4 * math.sqrt(n))
        sample = min(n, 256 * nlist)
        file = n * (4 * D + 8) + 4 * nlist * D
        add("lists", f"{nlist:,}")
        add("file of vectors", gb(4 * n * D))
        add("file of the index, float32", gb(file))
        add("the same, 8-bit codes", gb(n * (width(D, 8) + 8)))
        add("disk while building, beside the vectors", gb(2 * file + 4 * sample * D))
        add("least `max_memory`", gb(least_memory(nlist, D, sample)))
        add("training, 10 iterations", hours(2 * sample * nlist * D * NITER / rate.training))
        add("assigning", hours(2 * n * nlist * D / rate.assigning))
        add("writing", hours(file / rate.writing))
        add("memory to search by codes, rows in the file", gb((n / PANEL + nlist) * panel_bytes(D) + 8 * n))
        add("memory to search without codes, all rows in the file", gb(8 * n + 12 * nlist * D))
        add("rows that a query reads, nprobe 16, lists of one length", f"{NPROBE * n / nlist:,.0f}")
        add("queries/s by codes, warm, at most", f"{rate.searching / (NPROBE * n / nlist * D):,.0f}")
    return grid(head, ([name, *values] for name, values in rows.items()))


def gb(size: float) -> str:
    """Bytes in GB or MB.

    >>> gb(5.2e9), gb(4e7)
    ('5.2 GB', '40 MB')
    """
    return f"{size / 1e9:,.1f} GB" if size >= 1e9 else f"{size / 1e6:,.0f} MB"


def hours(seconds: float) -> str:
    """A time as people say it.

    >>> hours(90), hours(7200)
    ('2 min', '2.0 h')
    """
    return f"{seconds / 3600:,.1f} h" if seconds >= 3600 else f"{max(1, round(seconds / 60))} min"


def page(text: str, measured: list[Line]) -> str:
    """The text of the page with the tables of what was measured."""
    tables = {"built": built, "searched": searched, "planned": planned}
    return _MARKED.sub(lambda match: f"{match[1]}\n{tables[match[2]](measured)}\n\n{match[3]}", text)
