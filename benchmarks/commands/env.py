"""What this machine is, as it is stored beside every figure."""

from __future__ import annotations

import argparse
import json

from ..machine import add_threads, describe, set_threads

__all__ = ["add_arguments", "run"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_threads(parser)


def run(options: argparse.Namespace) -> int:
    set_threads(options.threads)
    print(json.dumps(describe(options.threads, ["env", "--threads", str(options.threads)]), indent=2))
    return 0
