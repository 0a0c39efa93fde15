"""Files that are there whole or not at all; what killed writers left behind goes with the next one."""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import os
import platform
import re
import secrets
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

__all__ = ["beside", "check_source", "check_target", "readable", "replace", "short_name"]

Found = TypeVar("Found")

# Where there are no such locks nobody can tell whether a writer runs, and nothing of others is removed.
fcntl: Any = importlib.import_module("fcntl") if os.name == "posix" else None

_LOCK = "lock"  # a file that the writer holds locked: the kernel unlocks it when the process ends, however it ends
_SHORT = 100  # bytes; file systems hold names of 143 (eCryptfs) or 255
_SILENT = 24 * 3600  # seconds without a write, from which a writer on another machine is taken for dead


def check_source(path: Path) -> None:
    """Refuse what is no file to read."""
    if path.is_dir():
        raise IsADirectoryError(f"{path} is a folder, not a file")
    if not path.is_file():
        raise FileNotFoundError(f"no such file: {path}")


def check_target(path: Path, *others: Path | None) -> None:
    """Refuse, before any work, a path that cannot be written, or that is one of the `others`, which are read."""
    if path.is_dir():
        raise IsADirectoryError(f"{path} is a folder; name a file to write")
    if not path.parent.is_dir():
        raise FileNotFoundError(f"no such folder: {path.parent}")
    for other in others:
        if other is not None and path.resolve() == other.resolve():
            raise ValueError(f"writing {path} would overwrite {other}; name another file")


def readable(read: Callable[[], Found], kind: type[Exception], text: str) -> Found:
    """The result of `read`. What it raises becomes an error of this kind, whose text is `text` and the reason.

    MemoryError remains one: a damaged file may ask for any size, and a sound one may be too large.
    """
    try:
        return read()
    except (kind, ImportError):
        raise
    except MemoryError as error:
        raise MemoryError(f"{text}: it is damaged, or takes more memory than there is") from error
    except Exception as error:  # readers raise a dozen kinds for damage, all of them meaning the same here
        raise kind(f"{text}: {error or type(error).__name__}") from error


def replace(path: Path, write: Callable[[str], None], suffix: str = "") -> None:
    """Write a file beside `path`, or beside the file it links to, whose name ends in `suffix`; sync; rename.

    Raises OSError naming `path` where there is no such folder, or a folder of this name.
    """
    path = Path(os.path.realpath(path))
    if path.is_dir():
        raise IsADirectoryError(f"{path} is a folder")
    with beside(path) as folder:
        part = folder / f"_{suffix or path.suffix}"  # no longer than the name of `path`
        part.touch()
        write(str(part))
        os.chmod(part, _mode_for(path))
        with part.open("rb+") as file:
            os.fsync(file.fileno())
        os.replace(part, path)
        if os.name == "posix":
            handle = os.open(path.parent, os.O_RDONLY)
            try:
                os.fsync(handle)
            finally:
                os.close(handle)


@contextlib.contextmanager
def beside(path: Path) -> Iterator[Path]:
    """A folder beside `path` for what is to be renamed into its place, removed at the end.

    First the folders are removed that writers of `path` left behind when they were killed. Those of writers that run
    stay, in whatever process, container or machine.
    """
    if not path.parent.is_dir():
        raise FileNotFoundError(f"no such folder: {path.parent}")
    _sweep(path)
    folder, handle = _locked_folder(path)
    try:
        yield folder
    finally:
        os.close(handle)  # first, because NFS keeps a file that is open
        shutil.rmtree(folder, ignore_errors=True)


def _locked_folder(path: Path) -> tuple[Path, int]:
    """A new folder, and the file in it that is locked while this process has it open."""
    while True:
        prefix = f".{short_name(path.name)}.{_machine()}."
        folder = Path(tempfile.mkdtemp(dir=path.parent, prefix=prefix, suffix=".part"))
        try:
            handle = os.open(folder / _LOCK, os.O_RDWR | os.O_CREAT, 0o600)
        except FileNotFoundError:  # another writer removed the folder while it was empty
            continue
        _lock(handle, wait=True)
        if _is_at(handle, folder / _LOCK):
            return folder, handle
        os.close(handle)  # another writer removed the folder while it was not locked


def short_name(name: str) -> str:
    """A name to build longer ones of, which a file system must hold that holds `name` itself: a long one is cut and
    ends in a digest of the whole.

    >>> short_name("index.pt")
    'index.pt'
    """
    whole = os.fsencode(name)
    if len(whole) <= _SHORT:
        return name
    return f"{whole[: _SHORT - 17].decode(errors='ignore')}.{hashlib.sha256(whole).hexdigest()[:16]}"


def _sweep(path: Path) -> None:
    """Remove what the killed writers of `path` left; whatever prevents that is no reason not to write."""
    name = re.compile(rf"\.{re.escape(short_name(path.name))}\.([0-9a-f]{{8}})\.[a-z0-9_]{{8}}\.part")
    with contextlib.suppress(OSError):
        found = [(Path(entry.path), name.fullmatch(entry.name)) for entry in os.scandir(path.parent)]
        for folder, match in found:
            if match and fcntl is not None:
                with contextlib.suppress(OSError):
                    _remove_dead(folder, match[1])


def _remove_dead(folder: Path, machine: str) -> None:
    """Remove a folder whose writer has ended.

    On this machine a lock that can be taken proves that. Another machine's lock may not be seen from here, as on a
    network file system that is mounted without locks, so its writer must besides have been silent for a day.
    """
    try:
        handle = os.open(folder / _LOCK, os.O_RDWR | os.O_NOFOLLOW)
    except FileNotFoundError:
        left = os.listdir(folder)
        if not left:
            os.rmdir(folder)  # which works while it is empty; who was about to lock it makes another
        elif _LOCK not in left:  # who removed it was killed: before all else a writer puts the lock there
            shutil.rmtree(folder, ignore_errors=True)
        return
    gone = folder.with_name(f"{folder.name[:-13]}{secrets.token_hex(4)}.part")
    try:
        if not _lock(handle) or (machine != _machine() and time.time() - _last_write(folder) < _SILENT):
            return
        if _is_at(handle, folder / _LOCK):
            folder.rename(gone)  # who was about to lock it sees that it is not there any more
    finally:
        os.close(handle)
    shutil.rmtree(gone, ignore_errors=True)


def _lock(handle: int, *, wait: bool = False) -> bool:
    """Lock a file, and say whether it is now; False too where the file system has no locks."""
    if fcntl is None:
        return False
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except OSError:
        return False
    return True


def _is_at(handle: int, path: Path) -> bool:
    """Whether an open file is the one at `path`."""
    try:
        return os.path.samestat(os.fstat(handle), path.stat())
    except FileNotFoundError:
        return False


def _last_write(folder: Path) -> float:
    return max(file.stat().st_mtime for file in (folder, *folder.iterdir()))


def _machine() -> str:
    """Whose locks can be seen from here: the running kernel, which all its containers share, or the machine's name."""
    try:
        name = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii")
    except OSError:
        name = platform.node()
    return hashlib.sha256(name.encode()).hexdigest()[:8]


def _mode_for(path: Path) -> int:
    """The permissions that a plain `open` would leave: those of the old file, or what the umask allows."""
    if path.exists():
        return path.stat().st_mode & 0o777
    mask = os.umask(0)
    os.umask(mask)
    return 0o666 & ~mask
