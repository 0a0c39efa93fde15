"""`python -m tests.fuzz.codes`: searches with 8-bit codes, without, and by brute force in float64 find the same rows.

Rows and queries are made to break the bound of the codes. Two answers are the same if they differ by no more than the
rounding errors of float32 scores, which make near ties of rows. The last line counts what ran. A wrong answer or any
error ends the run with exit code 1; `--seed` of the report with `--queries 1` repeats it.
"""

from __future__ import annotations

import argparse
import itertools
import random
import sys
import time
import traceback
import warnings
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

from tests.fuzz.__main__ import build_kernel
from tests.fuzz.hard import ROWS, Around
from tests.fuzz.model import nearest_lists
from tests.fuzz.vectors import LARGEST
from tests.oracle import comparable, stored_rows
from tests.problems import DTYPES, METRICS, few_training_rows
from torch_ivf_module import (
    IndexFlat,
    IndexIVFFlat,
    IndexIVFScalarQuantizer,
    IndexScalarQuantizer,
    SearchParams,
    native,
)
from torch_ivf_module.functional.metric import rounding

DIMS = (1, 2, 3, 4, 5, 7, 8, 13, 16, 31, 32, 33, 64, 64, 100, 128, 128, 192, 256, 512, 1000, 1024, 2048, 4096)
WORK = 1 << 25  # numbers of rows times queries times d of a case
PAIRS = 1 << 20  # rows times queries
LIMITS: tuple[dict[str, Any], ...] = (
    {"max_codes": 40},
    {"max_codes": 400},
    {"candidate_budget": 60},
    {"candidate_budget": 300, "budget_strategy": "uniform", "strict_budget": True},
    {"max_codes_cap_per_list": 9},
)
FLOAT32_LARGEST, FLOAT32_SMALLEST = torch.finfo(torch.float32).max, torch.finfo(torch.float32).tiny


@dataclass(frozen=True)
class Case:
    """An index and how it is searched, all of it decided by the seed."""

    seed: int
    rows: str  # their kind
    n: int
    later: int  # of them, rows that are added once there are codes
    removed: int
    d: int
    metric: str
    dtype: torch.dtype
    bits: int | None  # of a scalar quantizer
    nlist: int | None
    nprobe: int
    k: int
    queries: int
    threads: int
    selected: float | None  # the part of the rows that a filter keeps
    limits: dict[str, Any] = field(default_factory=dict)


@dataclass
class Tally:
    """Counters of what has run."""

    cases: int = 0
    queries: int = 0
    coded: int = 0  # queries of searches that read codes
    judged: int = 0  # queries whose rows were compared with those of brute force
    identical: int = 0  # bit by bit, with and without codes
    read: int = 0
    scored: int = 0


class Scores(NamedTuple):
    """Of all rows for each query, in float64, higher is better (Q, N)."""

    ids: Tensor  # (N,)
    true: Tensor
    error: Tensor  # the most by which a float32 score differs
    required: Tensor  # bool, what a search must take into account
    allowed: Tensor  # bool, and what it may
    sure: Tensor  # bool, whether float32 scores are finite, however they are computed


class Found(NamedTuple):
    """An answer as rows of `Scores`; N where there is none."""

    rows: Tensor  # (Q, k)
    chosen: Tensor  # (Q, N) bool
    worst: Tensor  # (Q,) the lowest score that the last row may have to be found; -inf where there is room


def case_of(seed: int) -> Case:
    draw = random.Random(seed)
    d = draw.choice(DIMS)
    n = round(2 ** draw.uniform(0, 11.5))
    if draw.random() < 0.01:  # several runs of rows that are sorted together
        n, d = 70_000, min(d, 16)
    n = min(n, WORK // (16 * d))
    queries = max(8, min(1000, PAIRS // n, WORK // (n * d)))
    bits = draw.choice((None, None, None, 8, 4))
    nlist = draw.choice((None, None, 1, 2, 5, 16))
    rows = draw.choice([kind for kind in sorted(ROWS) if kind != "overflowing" or nlist is None])
    return Case(
        seed=seed,
        rows=rows,
        n=n,
        later=draw.choice((0, 0, 0, n // 9, n // 2)),
        removed=draw.choice((0, 0, 0, n // 11, n // 2)),
        d=d,
        metric=draw.choice(METRICS),
        dtype=torch.float32 if bits else draw.choice((torch.float32, *DTYPES)),
        bits=bits,
        nlist=nlist,
        nprobe=draw.choice((1, 2, 3, nlist or 1, 64)),
        k=draw.choice((1, 1, 2, 5, 10, 10, 20, 33, 100, max(1, n - 1), n, n + 7)) if n < 3000 else 10,
        queries=queries if draw.random() < 0.8 else draw.randint(1, 12),
        threads=draw.choice((1, 1, 2, 3, 8)),
        selected=draw.choice((None, None, None, 0.02, 0.5, 0.9)),
        limits=draw.choice(LIMITS) if nlist and draw.random() < 0.15 else {},
    )


def made(case: Case, generator: torch.Generator) -> tuple[Any, Tensor]:
    """The index, with codes of all but the rows that were added later, and the rows."""
    rows = ROWS[case.rows](generator, case.n, case.d, LARGEST[case.dtype])
    rows = rows[torch.randperm(case.n, generator=generator)]
    settings: dict[str, Any] = {"bits": case.bits} if case.bits else {"dtype": case.dtype}
    if case.nlist is None:
        index: Any = (IndexScalarQuantizer if case.bits else IndexFlat)(case.d, metric=case.metric, **settings)
    else:
        kind: Any = IndexIVFScalarQuantizer if case.bits else IndexIVFFlat
        index = kind(case.d, nlist=case.nlist, nprobe=case.nprobe, metric=case.metric, **settings)
        with few_training_rows():
            few = ROWS[case.rows](generator, 8 * case.nlist, case.d, LARGEST[case.dtype])
            index.train(torch.cat([few, rows[:200]]), niter=1)
    index.codes = 8
    index.add(rows[: case.n - case.later])
    index.search(torch.zeros(1, case.d), 1)
    return index, rows


def run(case: Case, tally: Tally) -> None:
    """Search with codes and without, and compare: AssertionError where an answer is wrong."""
    generator = torch.Generator().manual_seed(case.seed)
    index, rows = made(case, generator)
    x = Around(generator, index, rows, case.rows).queries(case.queries)
    if case.later:
        index.add(rows[-case.later :])
    if case.removed:
        index.remove_ids(torch.randperm(case.n, generator=generator)[: case.removed])
    keep = None if case.selected is None else torch.rand(case.n, generator=generator) < case.selected
    answers = []
    for codes in (8, None):
        index.codes = codes
        params = SearchParams(selector=keep, debug_stats=True, **case.limits)
        answers.append(index.search(x, case.k, params=params))
        stats = index.last_search_stats
        if codes and stats["mode"] == "codes":
            tally.coded += len(x)
            tally.read += stats["rows_read"]
            tally.scored += stats["rows_scored"]
    compare(answers, index, x, case, keep)
    tally.cases += 1
    tally.queries += len(x)
    tally.judged += 0 if case.limits else len(x)
    same = [(one == other).all(1) for one, other in zip(*answers, strict=True)]
    tally.identical += int((same[0] & same[1]).sum())


def compare(
    answers: list[tuple[Tensor, Tensor]], index: Any, x: Tensor, case: Case, keep: Tensor | None
) -> None:
    finite = x.isfinite().all(1)
    for _, ids in answers:
        assert (ids[~finite] == -1).all(), "results of a query that is not finite"
    scores = scores_of(index, x[finite], case, keep)
    names = ("with codes", "without codes")
    found = []
    for (D, I), name in zip(answers, names, strict=True):
        found.append(checked(D[finite], I[finite], scores, case.metric, name))
        wrong = (scores.true - scores.error).masked_fill(~scores.required | found[-1].chosen, -torch.inf)
        _refuse(_most(wrong) > found[-1].worst, f"{name}: a row is missing that brute force finds")
    for (one, name), other in ((pair, found[1 - i]) for i, pair in enumerate(zip(found, names, strict=True))):
        more = one.chosen & ~other.chosen
        wrong = (scores.true - scores.error).masked_fill(~(more & scores.sure), -torch.inf)
        _refuse(_most(wrong) > other.worst, f"a better row is found {name} than by the other search")
        counts = (one.chosen.sum(1) != other.chosen.sum(1)) & scores.sure.all(1)
        _refuse(counts, f"{name}: another number of results than by the other search")


def scores_of(index: Any, x: Tensor, case: Case, keep: Tensor | None) -> Scores:
    """By brute force: of finite queries x (Q, d)."""
    stored = stored_rows(index)
    queries = comparable(x, case.metric)
    norms = torch.linalg.vector_norm(queries, dim=1)[:, None], torch.linalg.vector_norm(stored.vectors, dim=1)
    relative = 2 * rounding(case.d)
    if case.metric == "l2":
        true = -torch.cdist(queries, stored.vectors, compute_mode="donot_use_mm_for_euclid_dist").square()
        error, largest = relative * true.abs(), true.abs()
    else:
        true = queries @ stored.vectors.T
        largest = norms[0] * norms[1]
        error = relative * largest
    error = error + 4 * (case.d + 4) * FLOAT32_SMALLEST
    # A score that may overflow float32 may be missing, as that of a query whose norm squared does.
    sure = (largest < 0.99 * FLOAT32_LARGEST) & (norms[0] < 1.8e19) & (norms[1] < 1.8e19)
    allowed = true.abs() - error <= FLOAT32_LARGEST
    if keep is not None:
        allowed &= keep[stored.ids]
    required = allowed & sure
    if case.limits:
        required = torch.zeros_like(required)
    elif case.nlist is not None:
        reach = nearest_lists(queries, index.centroids, case.nprobe, case.metric)
        required, allowed = required & reach.required[:, stored.lists], allowed & reach.allowed[:, stored.lists]
    return Scores(stored.ids, true, error, required, allowed, sure)


def checked(D: Tensor, I: Tensor, scores: Scores, metric: str, name: str) -> Found:
    """The answer as rows, each of which may be found, once, at its score; best first."""
    got, none = (-D.double() if metric == "l2" else D.double()), I == -1
    _refuse((none != got.isneginf()).any(1) | got.isnan().any(1) | got.isposinf().any(1), f"{name}: padding")
    _refuse((got.diff(dim=1) > 0).any(1), f"{name}: not sorted")
    n = len(scores.ids)
    ordered, order = scores.ids.sort()
    rows = torch.searchsorted(ordered, I).clamp(max=max(0, n - 1))
    if n:
        _refuse(((ordered[rows] != I) & ~none).any(1), f"{name}: an unknown id")
        rows = order[rows]
    rows = rows.masked_fill(none, n)
    true, error, allowed = (
        torch.cat([part, part.new_zeros(len(part), 1)], 1).gather(1, rows)
        for part in (scores.true, scores.error, scores.allowed)
    )
    _refuse((~allowed & ~none).any(1), f"{name}: a row that must not be found")
    _refuse((((got - true).abs() > error) & ~none).any(1), f"{name}: a wrong distance")
    chosen = torch.zeros(len(D), n + 1, dtype=torch.bool).scatter_(1, rows, True)[:, :n]
    _refuse(chosen.sum(1) != (~none).sum(1), f"{name}: a row twice")
    worst = (true + error).masked_fill(none, -torch.inf).amin(1)
    return Found(rows, chosen, worst)


def _most(values: Tensor) -> Tensor:
    """The largest of each row of (Q, N), -inf if N is 0."""
    return torch.cat([values, values.new_full((len(values), 1), -torch.inf)], 1).amax(1)


def _refuse(wrong: Tensor, text: str) -> None:
    """AssertionError if `wrong` (Q,) is true for any query."""
    assert not wrong.any(), f"{text}: {int(wrong.sum())} finite queries, the first is {int(wrong.nonzero()[0])}"


def main(arguments: list[str] | None = None) -> int:
    """Run the command and return its exit code."""
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz.codes", description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--queries", type=int, default=1_000_000, help="how many at least (default 1,000,000)")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="end after this time")
    parser.add_argument("--seed", type=int, default=0, help="of the first case (default 0)")
    options = parser.parse_args(arguments)
    build_kernel()
    if not native.available():
        print("codes are for the kernel, and there is none", file=sys.stderr)
        return 2
    threads = torch.get_num_threads()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            return verify(options)
    finally:
        torch.set_num_threads(threads)


def verify(options: argparse.Namespace) -> int:
    began, tally, wrong = time.monotonic(), Tally(), None
    with tqdm(total=options.queries, unit=" queries") as bar:
        for seed in itertools.count(options.seed):
            if tally.queries >= options.queries or time.monotonic() - began > options.seconds:
                break
            case = case_of(seed)
            bar.set_postfix(seed=seed)
            torch.set_num_threads(case.threads)
            try:
                run(case, tally)
            except Exception as error:
                wrong = f"{''.join(traceback.format_exception(error))}\n{case}\nmismatch: --seed {seed} --queries 1"
                break
            bar.update(min(tally.queries, options.queries) - bar.n)
    spent = time.monotonic() - began
    print(
        f"{native.info()['isa']}: {tally.queries:,} queries of {tally.cases:,} indexes in {spent:.0f} s, seeds from"
        f" {options.seed} to {seed - 1}. {tally.coded:,} of them by codes, which read {tally.read:,} rows and scored"
        f" {tally.scored:,}. {tally.identical:,} are identical bit by bit with and without codes, the others up to ties"
        f" and rounding; {tally.judged:,} were compared with brute force too."
    )
    print(wrong or "no mismatch")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
