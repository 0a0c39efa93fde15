"""The cases that every search must answer, a float64 brute-force oracle, and the comparison of the two.

Q queries, L lists, N stored vectors, d dim, k results.

Scores inside this file are float64 and higher is better: the negated squared distance for l2, the inner
product for ip, the inner product of unit vectors for cosine. Answers are compared by score, so that ties may
come in any order; a query on the border between two lists, within float32 rounding, may have either of them.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from torch_ivf_module import IndexFlatIP, IndexFlatL2, IndexIVFFlat
from torch_ivf_module.functional.search import MODES as MODES  # of every search

METRICS = ("l2", "ip", "cosine")
DTYPES = (torch.float32, torch.float16, torch.bfloat16)

each_metric = pytest.mark.parametrize("metric", METRICS)
each_mode = pytest.mark.parametrize("mode", MODES)
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)

RTOL = 1e-4  # promised for D
PRODUCT_ROUNDING = 2e-6  # of |x| |v|, what a float32 inner product may lose to cancellation
PROBE_ROUNDING = 3e-6  # of the terms compared, within which two lists count as equally near
LARGEST = torch.finfo(torch.float32).max
SMALLEST = torch.finfo(torch.float32).tiny


# --- the cases ----------------------------------------------------------------------------------------------


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
    """The case of that name."""
    return _BY_NAME[name]


def normal(*shape: int, seed: int = 0) -> Tensor:
    """Standard normal float32 numbers that depend on nothing but the shape and the seed."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def lattice(*shape: int, seed: int = 0, reach: int = 2) -> Tensor:
    """Whole numbers in [-reach, reach] as float32: products and distances are exact, and ties are common."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-reach, reach + 1, shape, generator=generator).float()


def _data(function: Callable[..., Data]) -> Callable[..., Data]:
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
    """Centroids from many vectors, lists filled with few."""
    base, queries = _draw(problem, generator)
    return Data(torch.randn(4 * problem.nlist, problem.d, generator=generator), base, queries)


@_data
def half_space(problem: Problem, dtype: torch.dtype, generator: torch.Generator) -> Data:
    """Centroids everywhere, vectors on one side only; queries from both."""
    base, queries = _draw(problem, generator)
    return Data(base * 3, (base * 3)[base[:, 0] > 1], queries * 3)


@_data
def one_point(problem: Problem, dtype: torch.dtype, generator: torch.Generator) -> Data:
    """Every vector lies close to one training point."""
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
    """One vector many times; the queries lie around it, the first upon it."""
    train, queries = _draw(problem, generator)
    queries[:1] = train[:1].to(dtype).float()
    return Data(train, train[:1].expand(problem.nb, -1), queries)


@_data
def zeros(problem: Problem, dtype: torch.dtype, generator: torch.Generator) -> Data:
    """Vectors and queries among which every third is zero."""
    base, queries = _draw(problem, generator)
    base[::3] = 0
    queries[::3] = 0
    return Data(base, base, queries)


@_data
def bad_queries(problem: Problem, dtype: torch.dtype, generator: torch.Generator) -> Data:
    """NaN and both infinities in some of the queries."""
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
    """Clumps so far apart that no one origin is near to all."""
    base, queries = _draw(problem, generator)
    for part in (base, queries):
        part[::3] += 1000
        part[1::3, ::2] -= 1000
    return Data(base, base, queries)


@_data
def mixed(problem: Problem, dtype: torch.dtype, generator: torch.Generator) -> Data:
    """Norms spread over six decades."""
    base, queries = _draw(problem, generator)
    base *= 10 ** (6 * torch.rand(problem.nb, 1, generator=generator) - 3)
    queries *= 10 ** (6 * torch.rand(problem.nq, 1, generator=generator) - 3)
    return Data(base, base, queries)


@_data
def overflow(problem: Problem, dtype: torch.dtype, generator: torch.Generator) -> Data:
    """Vectors, and queries, so long that their distances (l2) or products (ip) do not fit float32."""
    base, queries = _draw(problem, generator)
    train = base.clone()
    base[::3] *= 1e3 if dtype == torch.float16 else 1e30
    queries[::4] *= 1e20
    return Data(train, base, queries)


def _scaled(huge: float, half: float) -> Callable[..., Data]:
    def make(problem: Problem, dtype: torch.dtype, generator: torch.Generator) -> Data:
        scale = half if dtype == torch.float16 else huge
        return Data(*(scale * part for part in gaussian(problem, dtype, generator)))

    return make


def _lattice(problem: Problem, dtype: torch.dtype, generator: torch.Generator) -> Data:
    base = torch.randint(-2, 3, (problem.nb, problem.d), generator=generator).float()
    return Data(base, base, torch.randint(-2, 3, (problem.nq, problem.d), generator=generator).float())


DATA["huge"] = _scaled(1e15, 1e4)
DATA["tiny"] = _scaled(1e-15, 1e-3)
DATA["lattice"] = _lattice


class Built(NamedTuple):
    index: Any
    base: Tensor
    queries: Tensor


@contextmanager
def few_training_rows() -> Iterator[None]:
    """Silence the one warning that small test indexes cannot avoid."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=r"(?s).*training rows for.*", category=UserWarning)
        yield


@contextmanager
def defaults(device: str | None = None, dtype: torch.dtype | None = None) -> Iterator[None]:
    """Another default device or dtype of torch's factories."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype or before)
    try:
        with torch.device(device or "cpu"):
            yield
    finally:
        torch.set_default_dtype(before)


def seed_of(problem: Problem) -> int:
    return sum(problem.name.encode()) + problem.nb


def data(problem: Problem, dtype: torch.dtype = torch.float32) -> Data:
    """The vectors of a case, the same at every call."""
    return DATA[problem.data](problem, dtype, torch.Generator().manual_seed(seed_of(problem)))


def ivf(
    problem: Problem = PLAIN, metric: str = "l2", dtype: torch.dtype = torch.float32, **settings: Any
) -> Built:
    """A fresh, trained and filled inverted file for a case."""
    train, base, queries = data(problem, dtype)
    settings = {"nlist": problem.nlist, "nprobe": problem.nprobe, "k": problem.k, **settings}
    index = IndexIVFFlat(problem.d, metric=metric, dtype=dtype, **settings)
    with few_training_rows():
        index.train(train, niter=4)
    index.add(base)
    return Built(index, base, queries)


@functools.cache
def _shared(problem: Problem, metric: str, dtype: torch.dtype) -> Built:
    return ivf(problem, metric, dtype)


def shared(
    problem: Problem = PLAIN, metric: str = "l2", dtype: torch.dtype = torch.float32, **settings: Any
) -> Built:
    """As `ivf`, a copy of one built before; `settings` are attributes to set (``nprobe=3``)."""
    index, base, queries = _shared(problem, metric, dtype)
    index = deepcopy(index)
    for name, value in settings.items():
        setattr(index, name, value)
    return Built(index, base, queries)


def flat(
    problem: Problem = PLAIN, metric: str = "l2", dtype: torch.dtype = torch.float32, **settings: Any
) -> Built:
    """A fresh exhaustive index for a case; metric l2 or ip."""
    _, base, queries = data(problem, dtype)
    index = {"l2": IndexFlatL2, "ip": IndexFlatIP}[metric](problem.d, dtype=dtype, **settings)
    index.add(base)
    return Built(index, base, queries)


# --- the oracle ---------------------------------------------------------------------------------------------


class Held(NamedTuple):
    """What an index holds, in float64: the oracle searches this."""

    ids: Tensor  # (N,)
    vectors: Tensor  # (N, d)
    lists: Tensor  # (N,)


class Probed(NamedTuple):
    """Lists that a query must visit and lists that it may visit, bool (Q, L); they differ only by ties."""

    required: Tensor
    allowed: Tensor


class Reach(NamedTuple):
    """Rows that a query must read and rows that it may read, bool (Q, N)."""

    required: Tensor
    allowed: Tensor


def held(index: Any) -> Held:
    """Read what `index` holds off its state_dict, whatever kind it is."""
    state = index.state_dict()
    ids, vectors = state["list_ids"].cpu(), state["packed_embeddings"].cpu().double()
    if "list_offsets" not in state:
        return Held(ids, vectors, torch.zeros_like(ids))
    sizes = state["list_offsets"].cpu().diff()
    return Held(ids, vectors, torch.repeat_interleave(torch.arange(len(sizes)), sizes))


def unit(x: Tensor) -> Tensor:
    """Rows scaled to length one in float64; a zero row stays zero."""
    x = x.double()
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    return x / torch.where(norm > 0, norm, 1)


def comparable(x: Tensor, metric: str) -> Tensor:
    """Vectors as the metric compares them, in float64, from what float32 keeps of the input."""
    return unit(x.float()) if metric == "cosine" else x.float().double()


def scores_of(queries: Tensor, vectors: Tensor, metric: str) -> Tensor:
    """Scores (Q, N), and NaN where float32 could not hold them: `queries` and `vectors` are comparable."""
    if metric == "l2":
        scores = -torch.cdist(queries, vectors, compute_mode="donot_use_mm_for_euclid_dist").square()
    else:
        scores = queries @ vectors.T
    return scores.masked_fill(~(scores.abs() <= LARGEST), torch.nan)


def tolerance(scores: Tensor, queries: Tensor, vectors: Tensor, metric: str) -> Tensor:
    """How far a float32 score may lie from the true one, (Q, N)."""
    allowed = RTOL * scores.abs() + SMALLEST
    if metric == "l2":
        return allowed
    return allowed + PRODUCT_ROUNDING * queries.norm(dim=1)[:, None] * vectors.norm(dim=1)


def list_scores(index: Any, queries: Tensor) -> tuple[Tensor, Tensor]:
    """Scores of the lists (Q, L) and how far apart two of them must be to be told apart (Q, 1)."""
    centroids = index.centroids.cpu().double()
    queries = comparable(queries, index.metric)
    if index.metric == "l2":
        scores = scores_of(queries, centroids, "l2")
        middle = centroids.mean(0)
        terms = (queries - middle).square().sum(1) + (centroids - middle).square().sum(1).max()
    else:
        scores = scores_of(queries, centroids, "ip")
        terms = queries.norm(dim=1) * centroids.norm(dim=1).max()
    return scores, PROBE_ROUNDING * terms[:, None]


def probed(index: Any, queries: Tensor, nprobe: int | None = None, max_codes: int | None = None) -> Probed:
    """The lists that each query visits, from the centroids alone."""
    scores, apart = list_scores(index, queries)
    nlist = scores.shape[1]
    width = min(index.nprobe if nprobe is None else nprobe, nlist)
    if width == nlist:
        everything = torch.ones_like(scores, dtype=torch.bool)
        probed = Probed(everything, everything)
    else:
        best = scores.nan_to_num(-torch.inf).topk(width + 1, dim=1).values
        probed = Probed(scores > best[:, -1:] + apart, scores >= best[:, -2:-1] - apart)
    return probed if max_codes is None else _capped(index, scores, apart, width, max_codes)


def _capped(index: Any, scores: Tensor, apart: Tensor, width: int, max_codes: int) -> Probed:
    """Whole lists, nearest first, until the next would pass the cap; the first always."""
    ordered, order = scores.sort(dim=1, descending=True)
    sizes = index.list_offsets.cpu().diff()[order[:, :width]]
    keep = sizes.cumsum(1) <= max_codes
    keep[:, :1] = True
    required = torch.zeros_like(scores, dtype=torch.bool).scatter_(1, order[:, :width], keep)
    # Where two lists could change places the cap could fall elsewhere: such a query is not judged.
    clear = (-ordered[:, : width + 1].diff(dim=1) > apart).all(1, keepdim=True)
    assert clear.double().mean() > 0.8, "this case is too full of ties to say what max_codes keeps"
    return Probed(required & clear, required | ~clear)


# --- comparisons --------------------------------------------------------------------------------------------


def _reach(held: Held, probed: Probed | Reach) -> Reach:
    """A choice of lists (Q, L) as a choice of rows (Q, N)."""
    return probed if isinstance(probed, Reach) else Reach(*(lists[:, held.lists] for lists in probed))


def _rows_of(ids: Tensor, held: Tensor) -> tuple[Tensor, Tensor]:
    """Rows (Q, k, m) that have the ids (Q, k), and which of them there are; m is how often an id is `held` at most."""
    ordered, order = held.sort()
    first, end = (torch.searchsorted(ordered, ids.contiguous(), right=right) for right in (False, True))
    place = first[:, :, None] + torch.arange(int((end - first).max()) if ids.numel() else 1)
    return order[place.clamp(max=len(order) - 1)], place < end[:, :, None]


def _at(values: Tensor, rows: Tensor) -> Tensor:
    """Of values (Q, N) those at `rows` (Q, k, m)."""
    return values.gather(1, rows.flatten(1)).view_as(rows)


def _score(distances: Tensor, metric: str) -> Tensor:
    return -distances.cpu().double() if metric == "l2" else distances.cpu().double()


def check(
    found: tuple[Tensor, Tensor],
    queries: Tensor,
    held: Held,
    metric: str,
    k: int,
    lists: Probed | Reach | None = None,
    slack: Tensor | float = 0.0,
) -> None:
    """Assert that `found` (D, I) is what the oracle finds in `held`, restricted to `lists` or rows where given.

    `slack` (Q, 1) is by how much a result may be worse than the best, for a search that does not promise the best.
    """
    D, I = found
    assert D.shape == I.shape == (len(queries), k)
    assert D.dtype == torch.float32
    assert I.dtype == torch.int64
    queries = comparable(queries.cpu(), metric)
    got, ids, padding = _score(D, metric), I.cpu(), I.cpu() == -1

    # Padding is -1 beside the worst distance, and comes last; all else is sorted and finite.
    assert torch.equal(got == -torch.inf, padding)
    assert not got.isnan().any()
    assert not (got == torch.inf).any()
    assert (got[:, 1:] <= got[:, :-1]).all()
    if metric == "l2":
        assert (D >= 0).all()

    scores = scores_of(queries, held.vectors, metric)
    allowance = tolerance(scores, queries, held.vectors, metric)
    usable = scores.isfinite()
    required = allowed = usable
    if lists is not None:
        required, allowed = (usable & rows for rows in _reach(held, lists))

    if not held.ids.numel():
        assert padding.all()
        return
    # Every result is a row that may be returned, at its true score, and no row is returned twice.
    rows, same = _rows_of(ids, held.ids)
    same &= _at(allowed, rows)
    off = ((_at(scores, rows) - got[:, :, None]).abs() - _at(allowance, rows)).masked_fill(~same, torch.inf)
    wrong = ~padding & ~(off <= 0).any(2)
    assert not wrong.any(), f"wrong or impossible results at (query, rank) {wrong.nonzero().tolist()[:5]}"
    ordered = ids.sort(dim=1).values
    repeats = torch.searchsorted(ordered, ids, right=True) - torch.searchsorted(ordered, ids)
    assert ((repeats <= same.sum(2)) | padding).all(), "a row was returned twice"

    # Nothing better was missed, and nothing better was invented: if every score is within its allowance, so is the
    # best of them, the second best, and so on.
    for rows, sign in ((required, 1), (allowed, -1)):
        missed = sign * (_best(scores - sign * allowance, rows, k) - got) > slack
        assert not missed.any(), f"not the k best at (query, rank) {missed.nonzero().tolist()[:5]}"


def _best(scores: Tensor, rows: Tensor, k: int) -> Tensor:
    """The k best scores among `rows` (Q, N), padded with -inf."""
    chosen = scores.masked_fill(~rows, -torch.inf)
    chosen = torch.cat([chosen, chosen.new_full((len(scores), k), -torch.inf)], dim=1)
    return chosen.topk(k, dim=1).values


def check_range(
    found: tuple[Tensor, Tensor, Tensor],
    queries: Tensor,
    held: Held,
    metric: str,
    radius: float,
    lists: Probed | Reach | None = None,
) -> int:
    """Assert that `found` (lims, D, I) holds the rows strictly inside `radius`; return how many those are."""
    lims, D, I = (part.cpu() for part in found)
    assert lims.dtype == I.dtype == torch.int64
    assert D.dtype == torch.float32
    assert lims.shape == (len(queries) + 1,)
    assert lims[0] == 0
    assert lims[-1] == len(D) == len(I)
    assert (lims.diff() >= 0).all()
    queries = comparable(queries, metric)
    scores = scores_of(queries, held.vectors, metric)
    slack = tolerance(scores, queries, held.vectors, metric)
    edge = -radius if metric == "l2" else radius
    assert (D < radius if metric == "l2" else D > radius).all()
    must, may = scores > edge + slack, scores > edge - slack
    if lists is not None:
        required, allowed = _reach(held, lists)
        must, may = must & required, may & allowed

    # Where nothing lies on the radius, within rounding, the answer is clear. Rows are told apart by id and, where
    # several share one, by score.
    got, asked = _score(D, metric), torch.repeat_interleave(torch.arange(len(queries)), lims.diff())
    clear = must.sum(1) == may.sum(1)
    found = clear[asked].nonzero()[:, 0]
    found = found[_in_order(got[found], I[found], asked[found])]
    of, rows = (may & clear[:, None]).nonzero(as_tuple=True)
    order = _in_order(scores[of, rows], held.ids[rows], of)
    of, rows = of[order], rows[order]
    wrong = lims.diff() != may.sum(1)
    assert not (wrong & clear).any(), f"queries {wrong.nonzero()[:5, 0].tolist()}: a row is missing, or one too many"
    wrong = of[I[found] != held.ids[rows]]
    assert not len(wrong), f"query {wrong[0]}: a row is missing, or one too many"
    wrong = of[(got[found] - scores[of, rows]).abs() > slack[of, rows]]
    assert not len(wrong), f"query {wrong[0]}: a result at a wrong distance"
    for q in (~clear).nonzero()[:, 0].tolist():
        mine = asked == q
        _check_doubtful(I[mine], got[mine], held.ids, scores[q], slack[q], must[q], may[q], q)
    return len(I)


def _check_doubtful(
    ids: Tensor, got: Tensor, held: Tensor, scores: Tensor, slack: Tensor, must: Tensor, may: Tensor, q: int
) -> None:
    """Assert that the results of one query are the rows that they `must` be, and others only where they `may`."""
    same = (ids[:, None] == held) & may  # (results, N)
    near = (scores - got[:, None]).abs() <= slack
    assert (same & near).any(1).all(), f"query {q}: a result outside the radius, or at a wrong distance"
    assert ((ids[:, None] == ids).sum(1) <= same.sum(1)).all(), f"query {q}: a row was returned twice"
    needed = held[must][:, None]
    enough = (needed == ids).sum(1) >= (needed == held[must]).sum(1)
    assert enough.all(), f"query {q}: a row is missing"


def _in_order(*keys: Tensor) -> Tensor:
    """An order that sorts by the last key, among equals by the one before it, and so on."""
    order = torch.arange(len(keys[0]))
    for key in keys:
        order = order[key[order].argsort(stable=True)]
    return order


def agree(
    ours: tuple[Tensor, Tensor], theirs: tuple[Tensor, Tensor], rtol: float = RTOL, atol: float = 0.0
) -> None:
    """Assert that two answers are one: the same distances, and the same ids but for the order of ties."""
    (D, I), (E, J) = ours, theirs
    torch.testing.assert_close(D, E, rtol=rtol, atol=atol)
    assert torch.equal(I == -1, J == -1)
    for q in (I != J).any(1).nonzero()[:, 0].tolist():
        _agree_on_one(D[q].tolist(), I[q].tolist(), E[q].tolist(), J[q].tolist(), rtol, atol, q)


def _agree_on_one(
    D: list[float], I: list[int], E: list[float], J: list[int], rtol: float, atol: float, q: int
) -> None:
    def tied(a: float, b: float) -> bool:
        return abs(a - b) <= 2 * (rtol * abs(b) + atol)

    for left, right, right_distances in ((zip(D, I, strict=True), J, E), (zip(E, J, strict=True), I, D)):
        for distance, id in left:
            if id == -1:
                continue
            others = [right_distances[j] for j, other in enumerate(right) if other == id] or right_distances[
                -1:
            ]
            assert any(tied(distance, other) for other in others), (
                f"query {q}: id {id} has no tie to excuse it"
            )


# --- state --------------------------------------------------------------------------------------------------


def snapshot(module: torch.nn.Module) -> dict[str, Tensor]:
    """A copy of a module's state_dict."""
    return {name: value.detach().clone() for name, value in module.state_dict().items()}


def same_state(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    """Whether two state_dicts hold the same tensors, bit for bit."""
    return one.keys() == other.keys() and all(
        value.dtype == other[name].dtype and torch.equal(value, other[name]) for name, value in one.items()
    )


SETTINGS = (
    "d",
    "k",
    "metric",
    "nprobe",
    "nlist",
    "ntotal",
    "is_trained",
    "max_codes",
    "search_mode",
    "max_bytes",
)


def settings_of(index: Any) -> dict[str, Any]:
    """What an index shows of itself besides its tensors."""
    return {name: getattr(index, name) for name in SETTINGS if hasattr(index, name)}


@contextmanager
def unchanged(index: Any) -> Iterator[None]:
    """Assert that the block leaves the tensors and the settings of `index` as they were."""
    before, settings = snapshot(index), settings_of(index)
    yield
    assert same_state(before, snapshot(index))
    assert settings == settings_of(index)
