"""Test data: the sizes and the vectors of every case that a search must answer.

d dim, k results. Every function gives the same tensors at every call.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor


class Data(NamedTuple):
    train: Tensor
    base: Tensor
    queries: Tensor


@dataclass(frozen=True)
class Problem:
    """One case of the grid: sizes, and the name of a function in DATA that makes the vectors."""

    name: str
    data: str = "gaussian"
    nb: int = 500
    d: int = 16
    nq: int = 19
    nlist: int = 12
    nprobe: int = 4
    k: int = 10


PROBLEMS = (
    Problem("plain"),
    Problem("wide", nb=1537, d=67, nq=131, nlist=23, nprobe=7, k=21),
    Problem("odd sizes", nb=101, d=13, nq=7, nlist=5, nprobe=3, k=3),
    Problem("d=1", nb=97, d=1, nq=11, nlist=7, nprobe=2),
    Problem("one query", nq=1),
    Problem("no queries", nq=0),
    Problem("one result", k=1),
    Problem("many results", nb=700, nlist=6, nprobe=4, k=300, nq=7),
    Problem("k above the candidates", nb=60, nlist=6, nprobe=1, k=40),
    Problem("k above everything", nb=20, nlist=4, nprobe=4, k=50),
    Problem("one list", nlist=1, nprobe=1),
    Problem("nprobe above nlist", nprobe=500),
    Problem("nearest list only", nprobe=1),
    Problem("more lists than vectors", nb=30, nlist=64, nprobe=9, data="sparse"),
    Problem("empty lists", data="half_space"),
    Problem("one list holds everything", data="one_point", nb=300, nprobe=2),
    Problem("one vector", data="sparse", nb=1),
    Problem("nothing added", data="sparse", nb=0),
    Problem("duplicates", data="duplicates"),
    Problem("identical vectors", data="identical"),
    Problem("ties", data="lattice", d=5),
    Problem("zero vectors", data="zeros"),
    Problem("huge norms", data="huge"),
    Problem("tiny norms", data="tiny"),
    Problem("mixed norms", data="mixed"),
    Problem("overflowing distances", data="overflow"),
    Problem("translated", data="translated"),
    Problem("far clumps", data="clumps"),
    Problem("bad queries", data="bad_queries"),
)
PLAIN = PROBLEMS[0]
_BY_NAME = {problem.name: problem for problem in PROBLEMS}

DATA: dict[str, Callable[[Problem, torch.dtype, torch.Generator], Data]] = {}


def problem(name: str) -> Problem:
    """The case with this name."""
    return _BY_NAME[name]


def normal(*shape: int, seed: int = 0) -> Tensor:
    """Standard normal float32 numbers that depend on the shape and the seed alone."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def lattice(*shape: int, seed: int = 0, reach: int = 2) -> Tensor:
    """Integers in [-reach, reach] as float32: products and distances are exact, and ties are frequent."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-reach, reach + 1, shape, generator=generator).float()


def _data(function: Callable[..., Data]) -> Callable[..., Data]:
    """Register a function in DATA under its name."""
    DATA[function.__name__] = function
    return function


def _draw(problem: Problem, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    base = torch.randn(problem.nb, problem.d, generator=generator)
    return base, torch.randn(problem.nq, problem.d, generator=generator)


@_data
def gaussian(problem: Problem, dtype: torch.dtype, generator: torch.Generator) -> Data:
    base, queries = _draw(problem, generator)
    return Data(base, base, queries)


@_data
def sparse(problem: Problem, dtype: torch.dtype, generator: torch.Generator) -> Data:
    """Many training vectors, few stored vectors."""
    base, queries = _draw(problem, generator)
    return Data(torch.randn(4 * problem.nlist, problem.d, generator=generator), base, queries)


@_data
def half_space(problem: Problem, dtype: torch.dtype, generator: torch.Generator) -> Data:
    """Training vectors and queries from the whole space, stored vectors from one half of it."""
    base, queries = _draw(problem, generator)
    return Data(base * 3, (base * 3)[base[:, 0] > 1], queries * 3)


@_data
def one_point(problem: Problem, dtype: torch.dtype, generator: torch.Generator) -> Data:
    """Every stored vector lies close to one training vector."""
    base, queries = _draw(problem, generator)
    train = torch.randn(problem.nlist, problem.d, generator=generator) * 10
    return Data(train, train[:1] + 0.1 * base, torch.cat([train[:1] + queries[::2], queries[1::2] * 10]))


@_data
def duplicates(problem: Problem, dtype: torch.dtype, generator: torch.Generator) -> Data:
    """Each vector eight times, and half of the queries are stored vectors."""
    base, queries = _draw(problem, generator)
    base = base[: problem.nb // 8].repeat(8, 1)
    queries[::2] = base[: len(queries[::2])].to(dtype).float()
    return Data(base, base, queries)


@_data
def identical(problem: Problem, dtype: torch.dtype, generator: torch.Generator) -> Data:
    """One vector many times; the queries lie around it, the first is equal to it."""
    train, queries = _draw(problem, generator)
    queries[:1] = train[:1].to(dtype).float()
    return Data(train, train[:1].expand(problem.nb, -1), queries)


@_data
def zeros(problem: Problem, dtype: torch.dtype, generator: torch.Generator) -> Data:
    """Every third vector and query is zero."""
    base, queries = _draw(problem, generator)
    base[::3] = 0
    queries[::3] = 0
    return Data(base, base, queries)


@_data
def bad_queries(problem: Problem, dtype: torch.dtype, generator: torch.Generator) -> Data:
    """Queries with NaN, inf and -inf."""
    base, queries = _draw(problem, generator)
    for row, value in ((1, torch.nan), (4, torch.inf), (5, -torch.inf), (problem.nq - 1, torch.nan)):
        queries[row, row % problem.d] = value
    queries[8] = torch.inf
    return Data(base, base, queries)


@_data
def translated(problem: Problem, dtype: torch.dtype, generator: torch.Generator) -> Data:
    base, queries = _draw(problem, generator)
    return Data(base + 1000, base + 1000, queries + 1000)


@_data
def clumps(problem: Problem, dtype: torch.dtype, generator: torch.Generator) -> Data:
    """Clusters so far apart that no origin is near to all of them."""
    base, queries = _draw(problem, generator)
    for vectors in (base, queries):
        vectors[::3] += 1000
        vectors[1::3, ::2] -= 1000
    return Data(base, base, queries)


@_data
def mixed(problem: Problem, dtype: torch.dtype, generator: torch.Generator) -> Data:
    """Norms between 1e-3 and 1e3 times the usual."""
    base, queries = _draw(problem, generator)
    base *= 10 ** (6 * torch.rand(problem.nb, 1, generator=generator) - 3)
    queries *= 10 ** (6 * torch.rand(problem.nq, 1, generator=generator) - 3)
    return Data(base, base, queries)


@_data
def overflow(problem: Problem, dtype: torch.dtype, generator: torch.Generator) -> Data:
    """Vectors and queries so long that their distances (l2) or products (ip) overflow float32."""
    base, queries = _draw(problem, generator)
    train = base.clone()
    base[::3] *= 1e3 if dtype == torch.float16 else 1e30
    queries[::4] *= 1e20
    return Data(train, base, queries)


def _scaled(huge: float, half: float) -> Callable[..., Data]:
    def make(problem: Problem, dtype: torch.dtype, generator: torch.Generator) -> Data:
        scale = half if dtype == torch.float16 else huge
        return Data(*(scale * vectors for vectors in gaussian(problem, dtype, generator)))

    return make


def _lattice(problem: Problem, dtype: torch.dtype, generator: torch.Generator) -> Data:
    base = torch.randint(-2, 3, (problem.nb, problem.d), generator=generator).float()
    return Data(base, base, torch.randint(-2, 3, (problem.nq, problem.d), generator=generator).float())


DATA["huge"] = _scaled(1e15, 1e4)
DATA["tiny"] = _scaled(1e-15, 1e-3)
DATA["lattice"] = _lattice


def seed_of(problem: Problem) -> int:
    return sum(problem.name.encode()) + problem.nb


def data(problem: Problem, dtype: torch.dtype = torch.float32) -> Data:
    """The vectors of a case, the same at every call."""
    return DATA[problem.data](problem, dtype, torch.Generator().manual_seed(seed_of(problem)))

