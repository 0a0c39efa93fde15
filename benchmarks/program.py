"""The one program: `python -m benchmarks COMMAND`.

A command is a module with ``add_arguments(parser)`` and ``run(options) -> exit status``, and one line in COMMANDS.
Only the module that is asked for is imported, for thread pools are sized when torch and numpy are.
"""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence

__all__ = ["COMMANDS", "main"]

COMMANDS: dict[str, tuple[str, str]] = {
    "env": ("commands.env", "print what this machine is: processor, threads, versions, commit"),
    "run": ("commands.run", "measure, and append the figures to benchmarks.jsonl"),
    "report": ("commands.report", "write the pages, tables and pictures from the stored figures; measures nothing"),
    "sweep-nq": ("commands.sweeps", "queries/s of every engine over batch sizes"),
    "sweep-ivf": ("commands.sweeps", "recall and queries/s over pairs of nlist and nprobe"),
    "sweep-codes": ("commands.sweeps", "recall and queries/s over max_codes"),
    "sweep-budgets": ("commands.sweeps", "recall and queries/s over candidate budgets"),
    "score-auto": ("commands.score_auto", "score the choices of search_mode='auto' and the constants behind them"),
    "profile": ("commands.sweeps", "searches of some batch sizes under torch.profiler, as a table of their phases"),
    "sharded": ("sharded", "what an index over several processes holds and sends, beside the formulas"),
}


def main(argv: Sequence[str] | None = None) -> int:
    words = list(sys.argv[1:] if argv is None else argv)
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description="Measure, and report what was measured.")
    subparsers = parser.add_subparsers(title="commands", metavar="COMMAND", dest="command", required=True)
    for name, (module, about) in COMMANDS.items():
        subparser = subparsers.add_parser(name, help=about, description=about[0].upper() + about[1:] + ".")
        if words[:1] == [name]:
            command = importlib.import_module(f"{__package__}.{module}")
            command.add_arguments(subparser)
            subparser.set_defaults(run=command.run)
    options = parser.parse_args(words)
    return int(options.run(options))
