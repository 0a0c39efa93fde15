"""``build-native``: have the kernel for this CPU compiled now, and not beside the first long search."""

from __future__ import annotations

import argparse
import time

from .. import native
from .common import Reporter, add_json

__all__ = ["add_arguments", "run"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the flags of `build-native`."""
    parser.add_argument("--again", action="store_true", help="also where it is built already")
    add_json(parser)


def run(args: argparse.Namespace) -> int:
    """Build, load, and say where it is."""
    talk = Reporter(args)
    talk.say("build", "the kernel for this CPU; where it is not built yet this takes about half a minute")
    began = time.perf_counter()
    try:
        file = native.build(again=args.again)
    except RuntimeError as error:
        raise ValueError(str(error)) from None  # its text is for the person who typed the command
    talk.say("built", f"{file} ({file.stat().st_size / 2**10:,.0f} KiB) in {time.perf_counter() - began:.1f} s")
    loads = native.available()
    talk.say("loads", "yes" if loads else "no" if native.enabled() else "not while TORCH_IVF_NATIVE=0")
    talk.result({"file": str(file), "bytes": file.stat().st_size, "loads": loads})
    return 0
