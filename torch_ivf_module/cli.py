"""The command line: ``python -m torch_ivf_module COMMAND``.

A command is a module with ``add_arguments(parser)`` and ``run(args) -> exit status``, and one line in COMMANDS.
"""

from __future__ import annotations

import argparse
import os
import sys
import warnings
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from . import __version__, demo
from .commands import build, build_native, convert, export, info, search

__all__ = ["main"]


class Command(NamedTuple):
    help: str
    add_arguments: Callable[[argparse.ArgumentParser], None]
    run: Callable[[argparse.Namespace], int]


COMMANDS = {
    name: Command(help, command.add_arguments, command.run)
    for name, command, help in (
        ("build", build, "build an index from a file of vectors"),
        ("search", search, "search an index for the nearest vectors of a file of queries"),
        ("info", info, "print what a saved index contains"),
        ("export", export, "write a model file that searches without this package"),
        ("convert", convert, "convert an index to another file format: from and to faiss, from torch-ivf"),
        ("build-native", build_native, "compile the native kernel, if the installed package has none"),
        ("demo", demo, "build and search an index of image patches, and compare it with exact search and faiss"),
    )
}


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m torch_ivf_module",
        description="An inverted-file (IVF) vector index that is a torch.nn.Module.",
        epilog="After an error, the reason is on stderr and the exit status is 1; with --json, stdout is empty.",
    )
    parser.add_argument("--version", action="version", version=f"torch_ivf_module {__version__}")
    subparsers = parser.add_subparsers(title="commands", metavar="COMMAND")
    for name, command in COMMANDS.items():
        subparser = subparsers.add_parser(name, help=command.help, description=command.help)
        command.add_arguments(subparser)
        subparser.set_defaults(run=command.run)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit status; without a command, print the help.

    Args:
        argv: the words after the program's name; None takes them from ``sys.argv``.

    Returns:
        0 on success; 1 if a check of the command failed, a file or an argument cannot be used, or an optional package
        is missing; 130 if it was interrupted. For wrong usage argparse exits with status 2.
    """
    parser = build_parser()
    args = parser.parse_args(argv)
    if not hasattr(args, "run"):
        parser.print_help()
        return 0
    try:
        with warnings.catch_warnings():
            warnings.showwarning = _show_warning
            return int(args.run(args))
    except BrokenPipeError:  # who reads the output, `head` for one, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130  # as shells have it: 128 + SIGINT
    # The texts of these are written for the person who typed the command.
    except (ImportError, OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


def _show_warning(message: Warning | str, category: type[Warning], *where: Any, **more: Any) -> None:
    """A warning as a line, without the place in the code that gave it."""
    print(f"warning: {message}", file=sys.stderr)
