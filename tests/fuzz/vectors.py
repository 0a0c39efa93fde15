"""Kinds of vectors: functions of a generator, a size, d and the largest norm that the storage dtype allows.

n rows, d dim.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

# The largest norm of a row. The squared distance of two such rows is less than the largest float32; the largest float16
# is 65,504.
LARGEST = {torch.float32: 9e18, torch.bfloat16: 9e18, torch.float16: 3e4}
SMALLEST = 1e-3
OVERFLOWING = 1e25  # a norm whose square overflows float32

Kind = Callable[[torch.Generator, int, int, float], Tensor]


def _plain(generator: torch.Generator, n: int, d: int, largest: float) -> Tensor:
    return torch.randn(n, d, generator=generator)


def _lattice(generator: torch.Generator, n: int, d: int, largest: float) -> Tensor:
    """Small integers: products and distances are exact, and ties frequent."""
    return torch.randint(-2, 3, (n, d), generator=generator).float()


def _zeros(generator: torch.Generator, n: int, d: int, largest: float) -> Tensor:
    x = _plain(generator, n, d, largest)
    x[torch.rand(n, generator=generator) < 0.6] = 0
    return x


def _copies(generator: torch.Generator, n: int, d: int, largest: float) -> Tensor:
    """Copies of one of three fixed rows."""
    rows = torch.randn(3, d, generator=torch.Generator().manual_seed(d))
    return rows[torch.randint(0, 3, (1,), generator=generator)].repeat(n, 1)


def _near_copies(generator: torch.Generator, n: int, d: int, largest: float) -> Tensor:
    """Rows around one of three fixed rows, closer to each other than to the origin."""
    return _copies(generator, n, d, largest) + 1e-3 * torch.randn(n, d, generator=generator)


def _one_enormous(generator: torch.Generator, n: int, d: int, largest: float) -> Tensor:
    x = _plain(generator, n, d, largest)
    if n:
        at = int(torch.randint(0, n, (1,), generator=generator))
        x[at] = of_norm(x[at : at + 1], log_uniform(generator, 1, 1e3, largest))[0]
    return x


def _mixed(generator: torch.Generator, n: int, d: int, largest: float) -> Tensor:
    """Norms of all magnitudes that the dtype allows."""
    return of_norm(torch.randn(n, d, generator=generator), log_uniform(generator, n, SMALLEST, largest))


def _translated(generator: torch.Generator, n: int, d: int, largest: float) -> Tensor:
    return _plain(generator, n, d, largest) + 1000


def _equal_entries(generator: torch.Generator, n: int, d: int, largest: float) -> Tensor:
    """Rows of equal entries, in small steps around 1 or 1000: all rounding errors of a product have one sign, and their
    sum is larger than the differences of rows."""
    offset = (1.0, 1000.0)[int(torch.randint(0, 2, (1,), generator=generator))]
    steps = torch.randint(-8, 9, (n, 1), generator=generator) / 1024
    return (offset * (1 + steps)).repeat(1, d)


def _beyond_float16(generator: torch.Generator, n: int, d: int, largest: float) -> Tensor:
    """Some rows have a value beyond the range of float16, unless that is the dtype."""
    x = _plain(generator, n, d, largest)
    if largest > 1e5:
        x[::3, 0] = 65_536 * (1 + 9 * torch.rand(len(x[::3]), generator=generator))
    return x


def _first_rows_far(generator: torch.Generator, n: int, d: int, largest: float) -> Tensor:
    x = _plain(generator, n, d, largest)
    x[:2] += min(1e6, largest / math.sqrt(d) / 2)
    return x


def _overflowing(generator: torch.Generator, n: int, d: int, largest: float) -> Tensor:
    """Some rows so long that their distances overflow float32, unless the dtype is float16."""
    x = _plain(generator, n, d, largest)
    if largest > 1e5:
        x[::3] = of_norm(x[::3], torch.tensor(OVERFLOWING))
    return x


KINDS: dict[str, Kind] = {
    "plain": _plain,
    "lattice": _lattice,
    "zeros": _zeros,
    "copies": _copies,
    "near_copies": _near_copies,
    "one_enormous": _one_enormous,
    "mixed": _mixed,
    "translated": _translated,
    "equal_entries": _equal_entries,
    "beyond_float16": _beyond_float16,
    "first_rows_far": _first_rows_far,
    "overflowing": _overflowing,
}
# Data for which the float32 answers of faiss are accurate: no cancellation, no overflow.
GENTLE = ("plain", "lattice", "zeros", "copies")


def vectors(kind: str, n: int, d: int, seed: int, dtype: torch.dtype) -> Tensor:
    """Rows (n, d) float32 of a kind; the same for the same seed."""
    return KINDS[kind](torch.Generator().manual_seed(seed), n, d, LARGEST[dtype])


def log_uniform(generator: torch.Generator, n: int, least: float, most: float) -> Tensor:
    exponent = torch.rand(n, generator=generator, dtype=torch.float64) * math.log10(most / least)
    return least * 10**exponent


def of_norm(x: Tensor, norm: Tensor) -> Tensor:
    """Rows with the directions of x (n, d) and the lengths `norm` (n,) or ()."""
    x = x.double()
    length = torch.linalg.vector_norm(x, dim=1, keepdim=True).clamp_min(1e-9)
    return (x / length * norm.double().reshape(-1, 1)).float()
