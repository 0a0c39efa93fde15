"""Whether the packages are reproducible: `make wheels` in two clones of the last commit, whose files are compared.

    python tests/dist_twice.py --venv .venv

The clones have names of different lengths, and the second build another umask, time zone and seed of Python's hashes.
Prints a SHA-256 for each file. Exits with code 1 if they differ. Compiles the native kernel twice, which takes minutes.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parent.parent
SURROUNDINGS = {
    "one": {"PYTHONHASHSEED": "1", "TZ": "UTC", "UMASK": "022"},
    "another/and_longer": {"PYTHONHASHSEED": "2", "TZ": "Asia/Tokyo", "UMASK": "077"},
}


def packages(commit: str, clone: Path, venv: Path, variables: dict[str, str]) -> dict[str, str]:
    """The names of the files that `make wheels` of a new clone writes, and their SHA-256."""
    umask = f"umask {variables['UMASK']}"
    ready = [f"{venv}/.ready-{extras}" for extras in ("dev", "dist")]
    make = f'make -s wheels VENV="{venv}" ' + " ".join(f'-o "{stamp}"' for stamp in ready)  # the packages are there
    checkout = f'git clone -q --no-hardlinks "{ROOT}" "{clone}" && git -C "{clone}" checkout -q --detach {commit}'
    commands = f'{umask} && {checkout} && {make} -C "{clone}"'
    left_out = ("MAKEFLAGS", "MAKELEVEL", "SOURCE_DATE_EPOCH", "PYTHONPATH")
    surroundings = {name: value for name, value in os.environ.items() if name not in left_out}
    subprocess.run(["sh", "-c", commands], check=True, stdout=subprocess.DEVNULL, env=surroundings | variables)
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in sorted((clone / "dist").iterdir())}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--venv", type=Path, default=Path(sys.prefix), help="with the packages of `make wheels`")
    venv = parser.parse_args().venv.absolute()
    head = subprocess.run(["git", "-C", ROOT, "rev-parse", "HEAD"], check=True, capture_output=True, text=True)
    commit = head.stdout.strip()
    with tempfile.TemporaryDirectory() as folder:
        one, other = (packages(commit, Path(folder, name), venv, setting) for name, setting in SURROUNDINGS.items())
    for name in sorted({*one, *other}):
        same = one.get(name) == other.get(name)
        print(f"{name}: {one.get(name)}" if same else f"{name} DIFFERS: {one.get(name)} and {other.get(name)}")
    return int(one != other)


if __name__ == "__main__":
    sys.exit(main())
