"""`python -m tests.killed_writers`: kill writers of index files at random moments, and see that no file is half done.

A writer replaces an old file by a new one in a forked process, which is killed by SIGKILL: after a random time, or at a
random line of this library. The old file or the new one must be there, complete; where there was none, none or the new
one. What else lies beside it must have the name of a temporary folder, and be gone after the next complete write. In a
folder of `save_pretrained` each file is the old one or the new one; huggingface_hub removes config.json before it
writes, so it may be missing.

The last line counts what ran; the exit code is 1 after a failure. It runs where processes fork.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import os
import random
import re
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from tqdm import tqdm

import torch_ivf_module
from tests.datasets import normal
from tests.problems import few_training_rows
from tests.states import same_state, snapshot
from torch_ivf_module import IndexIVFFlat, build_file, load
from torch_ivf_module.checkpoint import BadFile
from torch_ivf_module.cli import main as command

D, ROWS = 16, (4000, 5000)  # dimension, and rows of either version
LIBRARY = str(Path(torch_ivf_module.__file__).parent)
TEMPORARY = re.compile(r"\..+\.[0-9a-f]{8}\.[a-z0-9_]{8}\.part")
OUTCOMES = OLD, NEW, NONE, DONE, FAILED = (
    "left the old file", "left the new file", "left no file, as before", "more had finished", "failures"
)  # fmt: skip


class Writer(NamedTuple):
    """What writes version 0 or 1 into a folder, and the files that it writes, of which the first is an index."""

    write: Callable[[Path, int], object]
    files: tuple[str, ...]


def main(arguments: list[str] | None = None) -> int:
    """Run the command and return its exit code."""
    text = (__doc__ or "").split("\n\n")[0]
    parser = argparse.ArgumentParser(prog="python -m tests.killed_writers", description=text)
    parser.add_argument("--count", type=int, default=100, help="writers that are killed in time (default 100)")
    parser.add_argument("--seed", type=int, default=0, help="of the moments (default 0)")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)  # a process that has started threads does not fork well
    tally: Counter[str] = Counter()
    with tempfile.TemporaryDirectory() as folder:
        trials = [Trial(Path(folder, name), writer) for name, writer in writers(Path(folder)).items()]
        with tqdm(total=options.count, unit=" writers") as bar:
            for number in itertools.count():
                trial, chance = trials[number % len(trials)], random.Random(f"{options.seed} {number}")
                try:
                    outcome = trial.kill_one(chance)
                except Exception:
                    outcome = FAILED
                    bar.write(f"writer {number}, {trial.folder.name}: {traceback.format_exc()}", file=sys.stdout)
                    trial.write_whole(0)
                tally[outcome] += 1
                bar.update(outcome != DONE)
                if bar.n >= options.count:
                    break
    counts = ", ".join(f"{tally[name]:,} {name}" for name in OUTCOMES)
    kinds = ", ".join(trial.folder.name for trial in trials)
    print(f"{tally.total() - tally[DONE]:,} killed writers ({kinds}): {counts}")
    return int(tally[FAILED] > 0)


class Trial:
    """One kind of writer in a folder of its own."""

    def __init__(self, folder: Path, writer: Writer) -> None:
        self.folder, self.writer, self.path = folder, writer, folder / writer.files[0]
        folder.mkdir()
        self.contents: list[dict[str, bytes]] = []
        self.states: list[dict[str, Any]] = []
        self.write_whole(0)
        for version in (0, 1):
            began = time.perf_counter()
            self.write_whole(version)
            self.seconds = time.perf_counter() - began
            self.states.append(snapshot(load(self.path)))
            self.contents.append(self.files())
        assert not same_state(*self.states)
        with lines_counted(-1) as counted:
            self.write_whole(1)
        self.lines = counted[0]
        self.version: int | None = 1

    def write_whole(self, version: int) -> None:
        """One complete write, after which no temporary folder is left."""
        with contextlib.redirect_stdout(None), few_training_rows():
            self.writer.write(self.folder, version)
        left = sorted(os.listdir(self.folder))
        assert left == sorted(self.writer.files), f"after a complete write there are {left}"

    def files(self) -> dict[str, bytes]:
        return {name: (self.folder / name).read_bytes() for name in self.writer.files if (self.folder / name).exists()}

    def kill_one(self, chance: random.Random) -> str:
        """Kill one writer, and return which of OUTCOMES is there."""
        if chance.random() < 0.1:
            for name in self.writer.files:
                (self.folder / name).unlink(missing_ok=True)
            self.version = None
        new = 0 if self.version is None else 1 - self.version
        line = chance.randint(1, self.lines) if chance.random() < 0.5 else None
        seconds = chance.uniform(0, 1.1 * self.seconds)
        finished = killed(lambda: self.writer.write(self.folder, new), seconds, line)
        outcome = self.outcome(new)
        assert outcome == NEW or not finished
        if chance.random() < 0.3:
            new = chance.randrange(2)
            self.write_whole(new)
            self.version = new
        return DONE if finished else outcome

    def outcome(self, new: int) -> str:
        """Look at what is there, and note which version it is."""
        beside = set(os.listdir(self.folder)) - set(self.writer.files)
        assert all(map(TEMPORARY.fullmatch, beside)), f"beside the file there are {beside}"
        allowed = [new] if self.version is None else [self.version, new]
        for name, content in self.files().items():
            told = (content == self.contents[version].get(name) for version in allowed)
            assert name == self.writer.files[0] or any(told), f"{name} is neither the old file nor the new one"
        if not self.path.exists():
            assert self.version is None, "the file is gone"
            return NONE
        state = snapshot(load(self.path))
        found = [version for version in allowed if same_state(state, self.states[version])]
        assert found, "the index is neither the old one nor the new one"
        outcome = OLD if found[0] == self.version else NEW
        self.version = found[0]
        if len(self.writer.files) > 1:
            with contextlib.suppress(BadFile):  # without a config.json, or with the other one
                assert same_state(snapshot(IndexIVFFlat.from_pretrained(self.folder)), state)
        return outcome


def killed(write: Callable[[], object], seconds: float, line: int | None) -> bool:
    """Run `write` in another process and kill it after so many seconds or at a line; whether it was done before."""
    began, begins = os.pipe()
    process = os.fork()
    if not process:
        with contextlib.suppress(BaseException), open(os.devnull, "w") as nowhere, few_training_rows():
            os.dup2(nowhere.fileno(), 1)
            with lines_counted(line) if line else contextlib.nullcontext():
                os.write(begins, b".")
                write()
                os._exit(0)
        os._exit(1)
    os.close(begins)
    os.read(began, 1)
    os.close(began)
    if line is None:
        time.sleep(seconds)
        os.kill(process, signal.SIGKILL)
    status = os.waitpid(process, 0)[1]
    assert status in (0, signal.SIGKILL), f"the writer failed with {status}"
    return status == 0


@contextlib.contextmanager
def lines_counted(last: int) -> Any:
    """Count the lines of the library that run in the block; at the last one this process is killed."""
    counted = [0]

    def trace(frame: Any, event: str, argument: object) -> Any:
        if not frame.f_code.co_filename.startswith(LIBRARY):
            return None
        if event == "line":
            counted[0] += 1
            if counted[0] == last:
                os.kill(os.getpid(), signal.SIGKILL)
        return trace

    sys.settrace(trace)
    try:
        yield counted
    finally:
        sys.settrace(None)


def writers(folder: Path) -> dict[str, Writer]:
    """The writers, whose vectors are in `folder`."""
    vectors, indexes = [], []
    for version, rows in enumerate(ROWS):
        x = normal(rows, D, seed=version)
        vectors.append(folder / f"{version}.npy")
        np.save(vectors[version], x.numpy())
        indexes.append(IndexIVFFlat(D, nlist=8 + version).train(x))
        indexes[version].add(x)

    def settings(version: int) -> IndexIVFFlat:
        return IndexIVFFlat(D, nlist=8 + version)

    def build(place: Path, version: int) -> int:
        return command(["build", str(vectors[version]), str(place / "x.pt"), "--nlist", str(8 + version)])

    def to_faiss(place: Path, version: int) -> int:
        return command(["build", str(vectors[version]), str(place / "x.faiss"), "--nlist", str(8 + version)])

    pretrained = ("model.safetensors", "config.json", "README.md")
    return {
        "save": Writer(lambda place, version: indexes[version].save(place / "x.pt"), ("x.pt",)),
        "save safetensors": Writer(
            lambda place, version: indexes[version].save(place / "x.safetensors"), ("x.safetensors",)
        ),
        "build_file": Writer(
            lambda place, version: build_file(vectors[version], place / "x.pt", settings(version)), ("x.pt",)
        ),
        "save_pretrained": Writer(lambda place, version: indexes[version].save_pretrained(place), pretrained),
        "build": Writer(build, ("x.pt",)),
        "build for faiss": Writer(to_faiss, ("x.faiss",)),
    }


if __name__ == "__main__":
    sys.exit(main())
