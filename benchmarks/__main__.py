"""The command line: ``python -m benchmarks COMMAND``.

A command is a module with ``add_arguments(parser)`` and ``run(options) -> exit status``, and one line in COMMANDS.
Only the module of the given command is imported: the sizes of thread pools are fixed when torch and numpy are imported.
"""

import argparse
import importlib
import sys
from collections.abc import Sequence

COMMANDS: dict[str, tuple[str, str]] = {
    "env": ("machine", "print what is stored about this machine: processor, threads, versions, commit"),
    "run": ("commands.run", "measure, and append the figures to benchmarks.jsonl"),
    "report": ("commands.report", "write the page, the READMEs' tables and the plots from the stored figures"),
    "sweep-nq": ("commands.run", "queries/s of every engine over batch sizes"),
    "sweep-ivf": ("commands.run", "recall and queries/s over pairs of nlist and nprobe"),
    "sweep-codes": ("commands.run", "recall and queries/s over max_codes"),
    "sweep-budgets": ("commands.run", "recall and queries/s over candidate budgets"),
    "profile": ("commands.run", "searches of some batch sizes under torch.profiler, as a table of their operators"),
    "multi-vector": ("commands.multi_vector", "MaxSim beside a loop over documents, on a synthetic corpus, as a table"),
    "peers": ("commands.peers", "try what other libraries can do, and compare it with docs/peers.md"),
    "score-auto": ("commands.score_auto", "score the choices of search_mode='auto' and the constants behind them"),
}


def main(argv: Sequence[str] | None = None) -> int:
    words = list(sys.argv[1:] if argv is None else argv)
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description="Measure, and report what was measured.")
    subparsers = parser.add_subparsers(title="commands", metavar="COMMAND", dest="command", required=True)
    for name, (module, help) in COMMANDS.items():
        subparser = subparsers.add_parser(name, help=help, description=help[0].upper() + help[1:] + ".")
        if words[:1] == [name]:
            command = importlib.import_module(f"benchmarks.{module}")
            command.add_arguments(subparser)
            subparser.set_defaults(run=command.run)
    options = parser.parse_args(words)
    return int(options.run(options))


if __name__ == "__main__":
    sys.exit(main())
