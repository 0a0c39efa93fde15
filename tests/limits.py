"""Limits of the memory of a process, and what it takes and reads: for the commands on files larger than memory."""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import json
import mmap
import os
import resource
from collections.abc import Iterator
from pathlib import Path

from torch import Tensor


def parser_of(program: str, doc: str | None, vectors: str, parts: list[str]) -> argparse.ArgumentParser:
    """The arguments that these commands share; `vectors` says what --gigabytes counts, `parts` are their processes."""
    parser = argparse.ArgumentParser(prog=f"python -m {program}", description=(doc or "").split("\n\n")[0])
    parser.add_argument("--gigabytes", type=float, default=4.0, help=f"of float32 {vectors} (default 4)")
    parser.add_argument("--d", type=int, default=512, help="dimension (default 512)")
    parser.add_argument("--queries", type=int, default=500, help="of each measurement (default 500)")
    parser.add_argument("--no-cgroup", action="store_true", help="limit what is allocated only")
    parser.add_argument("--folder", type=Path, help="for the files, which are removed (default: a temporary folder)")
    parser.add_argument("--results", type=Path, help="append what was measured to a file of JSON lines")
    parser.add_argument("--part", choices=parts, help=argparse.SUPPRESS)
    parser.add_argument("--group", type=Path, help=argparse.SUPPRESS)
    return parser


@contextlib.contextmanager
def memory_group() -> Iterator[Path | None]:
    """A new control group below that of this process, whose memory can be limited; None if there can be none."""
    try:
        lines = [line.split(":", 2) for line in Path("/proc/self/cgroup").read_text().splitlines()]
    except OSError:
        lines = []
    roots = {"": "/sys/fs/cgroup", "memory": "/sys/fs/cgroup/memory"}
    for _, controllers, own in lines:
        if controllers not in roots:
            continue
        group = Path(roots[controllers] + own, f"larger_than_memory_{os.getpid()}")
        try:
            group.mkdir()
        except OSError:
            continue
        try:
            if limit_file(group).exists():
                yield group
                return
        finally:
            group.rmdir()
    yield None


def limit_file(group: Path) -> Path:
    old = group / "memory.limit_in_bytes"
    return old if old.exists() else group / "memory.max"


def drop(path: Path, mapped: Tensor | None = None) -> None:
    """Take the pages of the file out of the memory of this process, and of the system."""
    if mapped is not None:
        first = mapped.data_ptr() // mmap.PAGESIZE * mmap.PAGESIZE
        size = mapped.data_ptr() + mapped.nbytes - first
        ctypes.CDLL(None).madvise(ctypes.c_void_p(first), ctypes.c_size_t(size), mmap.MADV_DONTNEED)
    with path.open("rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def limit_all(group: Path | None, allowed: int) -> str:
    """Limit what this process uses from now on, pages of the file included, to `allowed` bytes; says what is."""
    if group is None:
        return "what it allocates is limited (RLIMIT_DATA), pages of the file are not"
    limit_file(group).write_text(str(allowed))
    (group / "cgroup.procs").write_text(str(os.getpid()))  # what it has used until now is counted elsewhere
    return f"pages of the file included ({limit_file(group).name} of a cgroup)"


def limit_allocations(allowed: int) -> None:
    """Limit what this process allocates from now on to `allowed` bytes. Its private mappings of files count."""
    resource.setrlimit(resource.RLIMIT_DATA, (memory()["VmData"] + allowed, resource.RLIM_INFINITY))


def memory() -> dict[str, int]:
    """The fields of /proc/self/status that are in bytes."""
    fields = (line.split() for line in Path("/proc/self/status").read_text().splitlines())
    return {words[0].rstrip(":"): int(words[1]) * 1024 for words in fields if words[-1] == "kB"}


def resident(before: dict[str, int]) -> str:
    now = memory()
    more = mb(now["RssAnon"] - before["RssAnon"])
    return f"RssAnon {mb(now['RssAnon'])}, {more} more than before, RssFile {mb(now['RssFile'])}"


def peak(group: Path | None) -> str:
    for name in ("memory.max_usage_in_bytes", "memory.peak") if group else ():
        if group and (group / name).exists():
            return f"; at most {mb(int((group / name).read_text()))} in the cgroup"
    return ""


def bytes_read() -> int:
    """From the disk, by this process."""
    return int(Path("/proc/self/io").read_text().split("read_bytes: ")[1].split()[0])


def store(path: Path | None, **facts: object) -> None:
    """Append what was measured to a file of JSON lines, if there is one."""
    if path is not None:
        with path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(facts) + "\n")


def mb(size: int) -> str:
    return f"{size / 1e6:,.0f} MB"
