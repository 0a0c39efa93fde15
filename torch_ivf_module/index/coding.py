"""The 8-bit codes beside the rows of an index: the setting `codes`, when they are made, and where they are kept.

N packed rows, L lists, P probes, Q queries, d dim.
"""

from __future__ import annotations

import ctypes
import mmap
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..functional.codec import Codes
from ..functional.kernels import Kernel, kernel_for
from ..functional.lists import InvertedLists

if TYPE_CHECKING:
    from .base import IndexBase

Setting = str | int | None
SETTINGS: tuple[Setting, ...] = ("auto", 8, None)
# "auto" makes codes from this many numbers (N * d) on. With half as many a single query gains 2 to 20 us.
_LEAST_VALUES = 1 << 20
# Visits of each list on average from which "auto" makes codes. Making them takes as long as searches with codes save in
# 20 to 60 visits of each list, one to eight queries at a time, and in 100 to 200, a thousand at a time (d = 64 and 128,
# N from 2,048 to 262,144).
_VISITS = 32
_SHARED_MEMORY = ("/dev/", "/memfd:", "/SYSV", "/anon_hugepage")  # names of mappings that are in memory


def checked_codes(value: Any) -> Setting:
    """`value` as a setting of `codes`; ValueError for any other value."""
    if isinstance(value, bool) or value not in SETTINGS:
        raise ValueError(f"codes must be 'auto', 8 or None, got {value!r}")
    return value if value in ("auto", None) else 8


def _get(self: IndexBase) -> Setting:
    """Whether an 8-bit copy of the rows is kept, which searches read first: "auto", 8 or None. Answers do not change.

    A search by the kernel excludes rows by their codes and a bound of the error, and scores the others exactly. "auto"
    keeps codes of float32 rows in the memory of a CPU with fast integer products, once the index is large enough and
    has been searched often enough since its last change; 8 from the next search on, also of float16 and bfloat16 rows
    and of a mapped file; None never. The copy takes a quarter of float32 rows, see `memory_bytes`, and is not saved.
    Assigning another value frees it.
    """
    return self._codes


def _set(self: IndexBase, value: Setting) -> None:
    value = checked_codes(value)
    if value != self._codes:
        self._codes = value
        self.store.versions.forget_codes()


codes_property = property(_get, _set)


class CodesCache:
    """The codes of some packed lists, once a search has made them.

    While one thread makes them, others search without codes.
    """

    def __init__(self, d: int) -> None:
        self._d = d
        self._making = threading.Lock()
        self._closed = False
        self._in_file: Tensor | None = None  # the rows in a file of which the system was told how they are read
        self._codes: Codes | None = None
        self._visits = 0.0  # of each list by queries, on average
        self._pay: bool | None = None  # whether "auto" makes codes of these rows, once it was found out

    def close(self) -> None:
        """Free the codes, and make no others."""
        self._closed = True
        self._expect_reads("NORMAL")
        self._codes = None

    @property
    def bytes(self) -> int:
        """Memory of the codes."""
        codes = self._codes
        return codes.bytes if codes else 0

    def get(self, setting: Setting, lists: InvertedLists, visits: float) -> Codes | None:
        """Codes for a search that visits each of the lists `visits` times: None, or made now if `setting` says so.

        The lists are those of the packed rows, of which some may be masked.
        """
        if setting is None:
            return None
        if (codes := self._codes) is not None:
            return codes
        self._visits += visits
        enough = lists.packed.numel() >= _LEAST_VALUES and self._visits >= _VISITS
        wanted = (enough and self._pay is not False) if setting == "auto" else lists.packed.shape[0] > 0
        if not wanted or self._closed or not self._making.acquire(blocking=False):
            return None
        try:
            if self._codes is None:
                self._make(setting, lists)
            return self._codes
        finally:
            self._making.release()

    def _make(self, setting: Setting, lists: InvertedLists) -> None:
        kernel = kernel_for(lists.sizes.new_empty(0, dtype=torch.float32))
        if kernel is None or not kernel.serves(lists.packed):
            return
        if setting == 8 or _pay(lists, kernel):
            self._in_file = lists.packed if in_file(lists.packed) else None
            self._expect_reads("SEQUENTIAL")
            self._codes = kernel.encode(lists, self._d)
            self._expect_reads("RANDOM" if self._codes else "NORMAL")
        self._pay = self._codes is not None
        if self._closed:  # meanwhile
            self.close()

    def _expect_reads(self, order: str) -> None:
        """Tell the system in which order rows in a file will be read: each would else bring megabytes around it."""
        advice = getattr(mmap, f"MADV_{order}", None)
        if self._in_file is not None and advice is not None:
            start = self._in_file.data_ptr() // mmap.PAGESIZE * mmap.PAGESIZE
            size = self._in_file.data_ptr() + self._in_file.nbytes - start
            ctypes.CDLL(None).madvise(ctypes.c_void_p(start), ctypes.c_size_t(size), advice)  # a hint: it may fail


def _pay(lists: InvertedLists, kernel: Kernel) -> bool:
    """Whether "auto" makes codes of the rows: if they are faster to read. A file would have to be read for them."""
    return lists.packed.dtype == torch.float32 and kernel.multiplies_codes() and not in_file(lists.packed)


def in_file(tensor: Tensor) -> bool:
    """Whether the elements of a CPU tensor are in a file that is mapped into memory, so that reading them may read it.

    Known on Linux, however it was mapped; elsewhere the answer is False.
    """
    try:
        mappings = Path("/proc/self/maps").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return False
    for line in mappings:
        addresses, *rest = line.split(maxsplit=5)
        start, end = (int(part, 16) for part in addresses.split("-"))
        if start <= tensor.data_ptr() < end:
            name = rest[-1] if len(rest) == 5 else ""  # memory that a program allocates has none
            return name.startswith("/") and not name.startswith(_SHARED_MEMORY)
    return False
