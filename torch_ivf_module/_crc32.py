"""CRC-32 of large memory by several threads: the number that zlib.crc32 computes by one."""

from __future__ import annotations

import zlib
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache, reduce

__all__ = ["crc32"]

PIECE = 8 << 20  # bytes that a thread reads at a time; zlib.crc32 releases the GIL meanwhile
_POLYNOMIAL = 0xEDB88320  # of CRC-32; the bit of x^0 is the highest
_ONE = 1 << 31


def crc32(data: memoryview, threads: int = 1) -> int:
    """CRC-32 of `data`, a contiguous view of bytes.

    >>> crc32(memoryview(b"123456789")) == 0xCBF43926
    True
    """
    pieces = [data[start : start + PIECE] for start in range(0, len(data), PIECE)]
    if threads < 2 or len(pieces) < 2:
        return zlib.crc32(data)
    with ThreadPoolExecutor(min(threads, len(pieces))) as pool:
        found = zip(pool.map(zlib.crc32, pieces), map(len, pieces), strict=True)
        return reduce(_joined, found, (0, 0))[0]


def _joined(before: tuple[int, int], after: tuple[int, int]) -> tuple[int, int]:
    """The CRC and the length of two pieces of data in a row, from those of each; as zlib's crc32_combine."""
    (first, size), (second, more) = before, after
    return _product(_zeros(more), first) ^ second, size + more


@lru_cache(maxsize=64)
def _zeros(size: int) -> int:
    """What a CRC is multiplied by when `size` bytes follow: x^(8 size), by repeated squaring."""
    result, power = _ONE, _ONE >> 8
    while size:
        if size & 1:
            result = _product(result, power)
        power, size = _product(power, power), size >> 1
    return result


def _product(a: int, b: int) -> int:
    """a * b modulo the polynomial, both with coefficients in GF(2)."""
    result = 0
    for bit in range(31, -1, -1):
        if a >> bit & 1:
            result ^= b
        b = b >> 1 ^ (_POLYNOMIAL if b & 1 else 0)
    return result
