"""The sweeps: one task over the values that the case has for it, or over others."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

from ..cases import CASES
from .run import add_common, measure

__all__ = ["SWEEPS", "add_arguments", "run"]


class Sweep(NamedTuple):
    task: str
    field: str  # of the case: what is swept over
    parse: Callable[[str], Any]  # one value


def _pair(text: str) -> tuple[int, int]:
    nlist, _, nprobe = text.partition(":")
    return int(nlist), int(nprobe)


SWEEPS = {
    "sweep-nq": Sweep("search", "nqs", int),
    "sweep-ivf": Sweep("pairs", "ivf", _pair),
    "sweep-codes": Sweep("codes", "codes", int),
    "sweep-budgets": Sweep("budgets", "budgets", int),
    "profile": Sweep("profile", "profile_nqs", int),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--case", choices=sorted(CASES), default="headline", help="default: headline")
    parser.add_argument(
        "--values",
        help="what to sweep over instead of the case's own values, with commas between them; pairs as 512:32. "
        "Such figures are stored, but the report keeps to the case's own values",
    )
    add_common(parser)


def run(options: argparse.Namespace) -> int:
    sweep, case = SWEEPS[options.command], CASES[options.case]
    words, values = [options.command, "--case", options.case], {}
    if options.values is not None:
        try:
            values[sweep.field] = tuple(sweep.parse(word) for word in options.values.split(","))
        except ValueError:
            like = ",".join(_spelt(value) for value in getattr(case, sweep.field)[:2])
            raise SystemExit(f"--values must be like {like}, got {options.values!r}") from None
        words += ["--values", options.values]
    return measure([(replace(case, **values), sweep.task)], options, words, values)


def _spelt(value: Any) -> str:
    return ":".join(map(str, value)) if isinstance(value, tuple) else str(value)
