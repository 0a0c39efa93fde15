"""Rows and queries made to break the bound of 8-bit codes, beside the kinds of vectors.py.

n rows, Q queries, d dim.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from tests.fuzz.vectors import KINDS, LARGEST, Kind, log_uniform, of_norm
from torch_ivf_module.functional import codec
from torch_ivf_module.functional.lists import vectors_of


def _denormal(generator: torch.Generator, n: int, d: int, largest: float) -> Tensor:
    """Numbers around the smallest normal one, whose squares are 0 in float32."""
    return torch.randn(n, d, generator=generator) * (1e-38 if largest > 1e5 else 1e-5)


def _constant(generator: torch.Generator, n: int, d: int, largest: float) -> Tensor:
    return torch.randn(n, 1, generator=generator).repeat(1, d)


def _one_coordinate(generator: torch.Generator, n: int, d: int, largest: float) -> Tensor:
    """One entry of each row decides its scale: the codes of all others are 0."""
    x = torch.randn(n, d, generator=generator) * 1e-3
    at = torch.randint(0, d, (n, 1), generator=generator)
    return x.scatter_(1, at, 1 + torch.rand(n, 1, generator=generator))


def _half_steps(generator: torch.Generator, n: int, d: int, largest: float) -> Tensor:
    """Entries half way between two codes, all to the same side: the errors of a row are as large as they can be, and
    parallel. Each row has its negative, so that a list is centred at 0."""
    half = torch.randint(0, 60, (n // 2 + 1, d), generator=generator) + 0.499
    half[:, 0] = 127
    return torch.cat([half, -half])[:n]


def _far_offset(generator: torch.Generator, n: int, d: int, largest: float) -> Tensor:
    return torch.randn(n, d, generator=generator) + min(1e6, largest / math.sqrt(d) / 2)


def _clumps(generator: torch.Generator, n: int, d: int, largest: float) -> Tensor:
    """Tight groups that are far from each other: no centre is near all rows of a list."""
    middles = torch.randn(5, d, generator=generator) * 100
    return middles[torch.arange(n) % 5] + 1e-3 * torch.randn(n, d, generator=generator)


def _magnitudes(generator: torch.Generator, n: int, d: int, largest: float) -> Tensor:
    """Norms from 1e-25 on."""
    return of_norm(torch.randn(n, d, generator=generator), log_uniform(generator, n, 1e-25, largest))


def _outlier(generator: torch.Generator, n: int, d: int, largest: float) -> Tensor:
    """One row at a norm around those from which on rows, or queries, have no code."""
    x = torch.randn(n, d, generator=generator)
    norm = 2.0 ** torch.empty(1).uniform_(38, 62, generator=generator)
    x[:1] = of_norm(x[:1], norm.clamp(max=largest))
    return x


ROWS: dict[str, Kind] = {
    **KINDS,
    "denormal": _denormal,
    "constant": _constant,
    "one_coordinate": _one_coordinate,
    "half_steps": _half_steps,
    "far_offset": _far_offset,
    "clumps": _clumps,
    "magnitudes": _magnitudes,
    "outlier": _outlier,
}


class Around:
    """Queries that depend on the rows (n, d) of an index, and on their codes."""

    def __init__(self, generator: torch.Generator, index: Any, rows: Tensor, kind: str) -> None:
        self.generator, self.index, self.rows, self.kind = generator, index, rows, kind
        self.d = rows.shape[1]

    def queries(self, count: int) -> Tensor:
        """Queries (count, d) of all kinds, in random order; some are not finite."""
        makers = sorted(_QUERIES)
        each = -(-count // len(makers))
        x = torch.cat([_QUERIES[maker](self, each).float() for maker in makers])
        return x[torch.randperm(len(x), generator=self.generator)[:count]]

    def normal(self, count: int) -> Tensor:
        return torch.randn(count, self.d, generator=self.generator)

    def some(self, count: int) -> Tensor:
        """Rows, any of them."""
        return self.rows[self.numbers(len(self.rows), count)]

    def numbers(self, below: int, count: int) -> Tensor:
        return torch.randint(0, below, (count,), generator=self.generator)

    def powers(self, least: float, most: float, count: int) -> Tensor:
        """Powers of ten (count, 1)."""
        return log_uniform(self.generator, count, 10**least, 10**most)[:, None]

    def alike(self, count: int) -> Tensor:
        return ROWS[self.kind](self.generator, count, self.d, LARGEST[torch.float32])

    def near(self, count: int) -> Tensor:
        rows = self.some(count)
        size = torch.linalg.vector_norm(rows.double(), dim=1, keepdim=True) / math.sqrt(self.d)
        return rows + self.normal(count) * self.powers(-8, 0, count) * size

    def middles(self, count: int) -> Tensor:
        """Half way between two rows, which are equally near."""
        return self.some(count) / 2 + self.some(count) / 2

    def multiples(self, count: int) -> Tensor:
        rows = self.some(count).double() * self.powers(-6, 6, count)
        return _within(rows, LARGEST[torch.float32])

    def centres(self, count: int) -> Tensor:
        """At the centres of lists, or so near that little of the query is left, around the least norm that is coded."""
        codes = self.codes()
        near = codes.centres[self.numbers(len(codes.centres), count)].double()
        step = self.normal(count) * self.powers(-16, -2, count)
        return near + step * (self.numbers(2, count) == 0)[:, None]

    def along_errors(self, count: int) -> Tensor:
        """From a row in the direction of what its code has lost, where the bound of a product is nearly reached."""
        codes, lists = self.codes(), self.index.store.segments()[1][0]
        full = lists.sizes[:-1].nonzero()[:, 0]
        number = int(full[self.numbers(len(full), 1)])
        if codes.limits[number, 0].isnan():  # a row is too long: the list has no codes
            return self.some(count)
        coded = codec.unpack(codes, number)
        at = self.numbers(len(coded.rows), count)
        centre = codes.centres[number].double()
        residual = coded.codes[at].double() * coded.scales[at, None].double()
        stored = vectors_of(lists.packed[int(lists.offsets[number]) + coded.rows[at]], self.d)
        lost = stored.double() - centre - residual
        size = torch.linalg.vector_norm(residual, dim=1, keepdim=True)
        length = torch.linalg.vector_norm(lost, dim=1, keepdim=True).clamp_min(1e-300)
        sign = 1 - 2.0 * self.numbers(2, count)[:, None]
        part = torch.rand(count, 1, generator=self.generator).double()
        return _within(centre + part * residual + sign * lost / length * size * self.powers(-3, 1, count), 9e18)

    def codes(self) -> codec.Codes:
        codes = self.index.store.codes.get(8, self.index.store.segments()[1][0], 0)
        assert codes is not None
        return codes


def _within(x: Tensor, most: float) -> Tensor:
    """Rows of x (n, d) float64, those longer than `most` shortened."""
    norm = torch.linalg.vector_norm(x, dim=1, keepdim=True)
    return x * (most / norm.clamp_min(most))


def _spoilt(around: Around, count: int) -> Tensor:
    """Not finite, or so long that squares overflow float32."""
    x = around.normal(count)
    x[::3, 0], x[1::3, -1] = torch.nan, -torch.inf
    x[2::3] = of_norm(x[2::3], torch.tensor(1e25))
    return x[: 1 + count // 4]


_QUERIES: dict[str, Callable[[Around, int], Tensor]] = {
    "alike": Around.alike,
    "copies": Around.some,
    "near": Around.near,
    "middles": Around.middles,
    "multiples": Around.multiples,
    "centres": Around.centres,
    "along_errors": Around.along_errors,
    "zeros": lambda around, count: torch.zeros(1 + count // 4, around.d),
    "tiny": lambda around, count: around.normal(count) * around.powers(-45, -10, count),
    "huge": lambda around, count: of_norm(around.normal(count), around.powers(6, 18.9, count)),
    "spoilt": _spoilt,
}
