"""``build-native``: compile the kernel where the installed package has none, as in a checkout."""

from __future__ import annotations

import argparse
import time

from .. import native
from .common import Reporter, add_json

__all__ = ["add_arguments", "run"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the flags of `build-native`."""
    parser.add_argument("--again", action="store_true", help="compile even if there is a kernel already")
    add_json(parser)


def run(args: argparse.Namespace) -> int:
    """Build, load, and say where it is."""
    talk = Reporter(args)
    talk.say("build", "the native kernel; where there is none yet this takes about a minute")
    began = time.perf_counter()
    try:
        file = native.build(again=args.again)
    except RuntimeError as error:
        raise ValueError(str(error)) from None  # its text is for the person who typed the command
    talk.say("built", f"{file} ({file.stat().st_size / 2**10:,.0f} KiB) in {time.perf_counter() - began:.1f} s")
    info = native.info()
    talk.say("loads", f"{info['file']} for {info['isa']}" if info["available"] else f"no: {info['why_not']}")
    talk.result({"file": str(file), "bytes": file.stat().st_size, "loads": info["available"]})
    return 0
