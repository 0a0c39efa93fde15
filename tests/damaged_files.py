"""`python -m tests.damaged_files`: open damaged files of every kind, and see that each is refused or harmless.

A file is damaged at random (damage.py) and opened in another process. It must be refused by a ValueError that names it,
or by a MemoryError if it asks for more memory than there is, or give what was written. Where no checksum can tell
(vectors of a mapped file, files of faiss and of vectors, files that were altered and given correct checksums), it may
give something else, but an index that is sound and can be searched. A process that crashes, hangs or takes more memory
than `--memory` is a failure, and so is any other error. Crashes and hangs within the parsers of faiss, HDF5 and Parquet
are counted by themselves.

The last line counts what ran; the exit code is 1 after a failure. `--first N --count 1` repeats the file number N.
"""

from __future__ import annotations

import argparse
import faulthandler
import itertools
import multiprocessing
import os
import random
import re
import shutil
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple

import torch
from tqdm import tqdm

from tests import vector_files
from tests.damage import damaged, forged
from tests.datasets import normal
from tests.fuzz.against_faiss import faiss
from tests.limits import limit_allocations
from tests.problems import few_training_rows
from tests.states import same_state, settings_of, snapshot
from torch_ivf_module import IndexFlatL2, IndexIVFFlat, IndexIVFScalarQuantizer, IndexPreTransform, load, to_faiss
from torch_ivf_module.hub import from_pretrained
from torch_ivf_module.vector_files import open_vectors

OUTCOMES = REFUSED, EQUAL, SOUND, OUTSIDE, FAILED = (
    "refused", "equal to what was written", "sound", "ended or hung other libraries", "failures"
)  # fmt: skip
PARSERS = ("faiss", "h5py", "pyarrow")
TRACE = "trace"  # a file with the calls of a process that has crashed or hangs
D, ROWS = 8, 60
SECONDS = 60  # after which a file has hung the process


class Kind(NamedTuple):
    """A kind of file, and how it is opened."""

    file: str
    mmap: bool = False
    codes: Any = "saved"
    checksums: bool = True  # whether everything that is read is checked
    forge: bool = False  # give it correct checksums again


KINDS = {
    **{f"{file}{how}": Kind(file, mmap, codes, not mmap)
       for file in ("ivf.pt", "ivf.safetensors", "codes.pt", "codes.safetensors", "half.pt", "flat.safetensors")
       for how, mmap, codes in (("", False, "saved"), (" mapped", True, None), (" mapped, codes", True, 8))
       if codes != 8 or not file.startswith("codes")},
    **{f"{file} forged{how}": Kind(file, mmap, codes, False, forge=True)
       for file in ("ivf.pt", "ivf.safetensors", "codes.pt", "flat.safetensors")
       for how, mmap, codes in (("", False, "saved"), (" mapped", True, "saved"))},
    "transform.pt": Kind("transform.pt"),
    "config.json": Kind("config.json", checksums=False),  # of a folder of save_pretrained
    **{file: Kind(file, checksums=False) for file in ("ivf.faiss", "codes.faiss", "flat.faiss")},
    **{f"vectors {file}": Kind(file, checksums=False) for file in vector_files.WRITERS},
}  # fmt: skip


def main(arguments: list[str] | None = None) -> int:
    """Run the command and return its exit code."""
    options = parsed(arguments)
    tally: Counter[str] = Counter()
    with tempfile.TemporaryDirectory() as folder, tqdm(total=options.count, unit=" files") as bar:
        originals(Path(folder))
        for number, outcome, about in outcomes(Path(folder), options):
            tally[outcome] += 1
            bar.update()
            if outcome in (OUTSIDE, FAILED):
                bar.write(f"file {number}: {about}", file=sys.stdout)
    counts = ", ".join(f"{tally[name]:,} {name}" for name in OUTCOMES)
    print(f"{sum(tally.values()):,} damaged files of {len(kinds_of(options))} kinds: {counts}")
    return int(tally[FAILED] > 0)


def parsed(arguments: list[str] | None) -> argparse.Namespace:
    text = (__doc__ or "").split("\n\n")[0]
    parser = argparse.ArgumentParser(prog="python -m tests.damaged_files", description=text)
    parser.add_argument("--count", type=int, default=2000, help="files (default 2000)")
    parser.add_argument("--first", type=int, default=0, help="the number of the first file (default 0)")
    parser.add_argument("--seed", type=int, default=0, help="another seed is another damage (default 0)")
    parser.add_argument("--kinds", default="", help="only kinds of file that this regular expression matches")
    parser.add_argument("--memory", type=int, default=256, help="MB that a process may allocate (default 256)")
    return parser.parse_args(arguments)


def kinds_of(options: argparse.Namespace) -> list[str]:
    found = [name for name in KINDS if re.search(options.kinds, name)]
    if not found:
        raise SystemExit(f"--kinds must match one of {', '.join(KINDS)}")
    return found


# --- the process that watches -------------------------------------------------------------------------------


def outcomes(folder: Path, options: argparse.Namespace) -> Iterator[tuple[int, str, str]]:
    """The number of each file, one of OUTCOMES and more about it. A process that ends is replaced by another."""
    context = multiprocessing.get_context("spawn")
    number, end = options.first, options.first + options.count
    while number < end:
        ours, theirs = context.Pipe(duplex=False)
        worker = context.Process(target=work, args=(folder, options, number, theirs), daemon=True)
        worker.start()
        theirs.close()
        ours.recv()  # it has begun, which takes a while where many processes run
        while number < end:
            try:
                if not any(ours.poll(1.0) for _ in range(SECONDS)):  # one by one: both processes may be stopped
                    assert worker.pid
                    os.kill(worker.pid, signal.SIGUSR1)
                    time.sleep(1.0)
                    yield number, *ended(folder, f"{kind_of(options, number)}: hangs")
                    break
                yield ours.recv()
            except EOFError:
                worker.join()
                yield number, *ended(folder, f"{kind_of(options, number)}: the process ended with {worker.exitcode}")
                break
            finally:
                number += 1
        worker.kill()
        worker.join()


def ended(folder: Path, what: str) -> tuple[str, str]:
    """OUTSIDE if a process has ended, or hangs, within a parser that is not ours, else FAILED; and more about it."""
    calls = (folder / TRACE).read_text() if (folder / TRACE).exists() else ""
    last = re.search(r'File "(.*)", line', calls)
    outside = last and any(f"site-packages/{name}/" in last[1] for name in PARSERS)
    return OUTSIDE if outside else FAILED, f"{what}, in {last[0]}" if outside and last else f"{what}\n{calls}"


def traced(folder: Path) -> None:
    """Have the calls of this process written into a file if it crashes, or when it is asked for them."""
    file = (folder / TRACE).open("w")
    faulthandler.enable(file)
    faulthandler.register(signal.SIGUSR1, file)


def kind_of(options: argparse.Namespace, number: int) -> str:
    return kinds_of(options)[number % len(kinds_of(options))]


# --- the process that opens the files -----------------------------------------------------------------------


def work(folder: Path, options: argparse.Namespace, first: int, results: Connection) -> None:
    """Open the damaged files from `first` on, and tell of each."""
    traced(folder)
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")  # of torch, about tensors of other programs
    expected = {name: opened(folder / kind.file, kind) for name, kind in KINDS.items()}
    limit_allocations(options.memory * 2**20)
    results.send(None)
    for number in range(first, options.first + options.count):
        name = kind_of(options, number)
        outcome, about = tried(name, expected[name], folder, random.Random(f"{options.seed} {number}"))
        results.send((number, outcome, f"{name}: {about}"))


def tried(name: str, expected: Any, folder: Path, chance: random.Random) -> tuple[str, str]:
    """Damage one file and open it: one of OUTCOMES, and more about it."""
    kind = KINDS[name]
    path = folder / f"damaged-{kind.file}"
    if kind.forge:
        how = forged(chance, folder / kind.file, path)
    else:
        how, content = damaged(chance, (folder / kind.file).read_bytes())
        path.write_bytes(content)
    try:
        found = opened(path, kind)
        if same(found, expected):
            return EQUAL, how
        if kind.checksums:
            return FAILED, f"{how}: another index, in spite of its checksums"
        check_sound(found)
        return SOUND, how
    except (ValueError, MemoryError) as error:
        if kind.file not in str(error):
            return FAILED, f"{how}: {error!r} does not name the file\n{traceback.format_exc()}"
        return REFUSED, how
    except Exception as error:
        return FAILED, f"{how}: {error!r}\n{traceback.format_exc()}"


def opened(path: Path, kind: Kind) -> Any:
    """The index in a file or folder, or the vectors (n, d) of a file of vectors."""
    if kind.file == "config.json":
        place = path.with_name("pretrained")
        shutil.copyfile(path, place / "config.json")
        return from_pretrained(place)
    if kind.file in vector_files.WRITERS:
        vectors = open_vectors(path, "train" if kind.file == "x.hdf5" else None)
        return torch.cat([torch.empty(0, vectors.d), *itertools.islice(vectors.batches(250), 100)])
    return load(path, mmap=kind.mmap, codes=kind.codes)


def same(found: Any, expected: Any) -> bool:
    if isinstance(expected, torch.Tensor):
        return found.shape == expected.shape and torch.equal(found, expected)
    if type(found) is not type(expected) or settings_of(found) != settings_of(expected):
        return False
    return same_state(snapshot(found), snapshot(expected))


def check_sound(found: Any) -> None:
    """Assert that an index can be searched and changed, and finds only what it holds, or that vectors are vectors."""
    if isinstance(found, torch.Tensor):
        assert found.dim() == 2
        return
    found.check_buffers()
    ids, offsets = found.list_ids, found.list_offsets.tolist()
    assert offsets == sorted(offsets)
    assert [0, len(ids)] == [offsets[0], offsets[-1]] if offsets else not len(ids)
    if not found.is_trained:
        return
    x = normal(9, found.d, seed=3)
    for k in (1, 5, len(ids) + 3):
        I = found.search(x, k)[1]
        assert torch.isin(I, torch.cat([ids, torch.tensor([-1])])).all()
    found.range_search(x, 1.0)
    assert found.remove_ids(ids[:3]) >= min(3, len(ids.unique()))
    found.add_with_ids(x, torch.arange(len(x)))
    found.search(x, 5)


# --- what is damaged ----------------------------------------------------------------------------------------


def originals(folder: Path) -> None:
    """Write a sound file of each kind."""
    x = normal(ROWS, D, seed=1)
    with few_training_rows():
        made = {
            "ivf": IndexIVFFlat(D, nlist=4, nprobe=2),
            "codes": IndexIVFScalarQuantizer(D, nlist=4, nprobe=2),
            "half": IndexIVFFlat(D, nlist=4, nprobe=2, metric="cosine", dtype=torch.float16),
            "flat": IndexFlatL2(D),
            "transform": IndexPreTransform(D, torch.nn.Linear(D, 5).eval(), IndexFlatL2(5)),
        }
        for index in made.values():
            index.fit(x).add(x)
        for file in {kind.file for kind in KINDS.values()}:
            name, _, suffix = file.partition(".")
            if file in vector_files.WRITERS:
                vector_files.WRITERS[file](folder / file, normal(100, vector_files.D, seed=2))
            elif suffix == "faiss":
                faiss.write_index(to_faiss(made[name]), str(folder / file))
            elif file == "config.json":
                made["ivf"].save_pretrained(folder / "pretrained")
                shutil.copyfile(folder / "pretrained" / file, folder / file)
            else:
                made[name].save(folder / file)


if __name__ == "__main__":
    sys.exit(main())
