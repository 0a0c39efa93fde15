"""Which inverted lists to split, which to merge, and which centroids to compute again.

L lists, d dim, P parts of a list, S sampled rows, R rows of some lists.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from . import metric as metrics
from .kmeans import kmeans
from .probe import Coarse, coarse_of, nearest_by_ranking, probe

_SAMPLE = 256  # rows per part from which its centroid is computed
_NITER = 4  # iterations of k-means that split a list
_FIT = 2  # iterations of k-means over all lists of a plan
_NEIGHBOURS = 8  # lists nearest to each new centroid whose rows may be nearer to it
# Moving the b rows of a list to others, of about the mean length m, adds 2 b m to the sum of squared lengths, which is
# what searches read. Splitting has to save twice that.
_MARGIN = 2
_CHANGED = 0.05  # part of the rows of a list, from which on its centroid is out of date


class Split(NamedTuple):
    """A list that becomes several parts, which get its number and those of lists that are merged with others."""

    long: int  # the list that is split
    short: list[int]  # P - 1 lists that are merged with others
    centroids: Tensor  # (P, d) float32


class Splits(NamedTuple):
    """What `find_splits` found."""

    splits: list[Split]
    rows: int  # in the lists of the splits
    wasted: int  # rows that were sampled from lists that cannot be split
    too_long: int  # lists that were left since they have more rows than may be read


class Plan(NamedTuple):
    """What one call changes."""

    splits: Splits
    numbers: list[int]  # lists whose rows are read, and whose centroids are fitted together
    centroids: Tensor  # (L, d) float32, before they are fitted


def imbalance_of(sizes: Tensor) -> float:
    """``L * sum(sizes ** 2) / sum(sizes) ** 2`` of list lengths (L,); 1 without rows.

    >>> imbalance_of(torch.tensor([4, 4])), imbalance_of(torch.tensor([8, 0]))
    (1.0, 2.0)
    """
    sizes = sizes.double()
    total = sizes.sum().square()
    return float(sizes.shape[0] * sizes.square().sum() / total) if float(total) else 1.0


def plan(
    sizes: Tensor,
    fitted: Tensor,
    sample: Callable[[int, int], Tensor],
    coarse: Coarse,
    metric: str,
    max_rows: int,
    generator: torch.Generator,
) -> Plan:
    """Which lists of `sizes` (L,) rows to read, at most `max_rows` of them, and the centroids to start from.

    A list had `fitted` (L,) rows when its centroid was computed. `sample` is that of `find_splits`.
    """
    counts = sizes.tolist()
    splits = find_splits(counts, sample, metric, max_rows, generator)
    merges = find_merges(splits, coarse, metric)
    numbers = [number for number, _ in numbered(splits.splits)]
    numbers += neighbours(splits, merges, counts, coarse, metric, max_rows // 2)
    left = max_rows - splits.wasted - sum(counts[number] for number in numbers)
    numbers += outdated(sizes, fitted, numbers, left)
    return Plan(splits, numbers, _start(splits, merges, counts, coarse.centroids, metric))


def fit(x: Tensor, plan: Plan, metric: str, generator: torch.Generator) -> Tensor:
    """The centroids (L, d) after k-means of the lists of a plan on their rows x (R, d)."""
    centroids, numbers = plan.centroids, plan.numbers
    if x.shape[0] < len(numbers):
        return centroids
    at = torch.tensor(numbers, device="cpu").to(x.device)
    own = kmeans(x, len(numbers), niter=_FIT, metric=metric, generator=generator, start=centroids[at])[0]
    return centroids.index_copy(0, at, own)


def find_splits(
    sizes: Sequence[int],
    sample: Callable[[int, int], Tensor],
    metric: str,
    max_rows: int,
    generator: torch.Generator,
) -> Splits:
    """The longest lists with the shortest ones that they replace, and the centroids of their parts.

    A list of `sizes` (L,) rows is to have as many parts as its length is times the mean. ``sample(list, count)`` gives
    at most `count` rows of a list (S, d) float32. The lists have at most `max_rows` rows in all, and at most half of
    that but for the first. Lists of equal rows are left as they are.
    """
    found: list[Split] = []
    mean = sum(sizes) / max(1, len(sizes))
    rows = wasted = too_long = 0
    order = sorted(range(len(sizes)), key=sizes.__getitem__)
    unused = [number for number in order if 2 * sizes[number] <= mean]
    for long in reversed(order):
        short = _replaced(sizes, long, unused, mean)
        if not short:
            break  # nor has any shorter list enough rows
        count = sizes[long] + sum(sizes[number] for number in short)
        if rows + count > (max_rows // 2 if found else max_rows) - wasted:
            too_long += sizes[long] > max_rows
            continue
        x = sample(long, _SAMPLE * (len(short) + 1))
        centroids = kmeans(x, len(short) + 1, niter=_NITER, metric=metric, generator=generator)[0]
        if _saved(sizes[long], x, centroids, metric) <= _MARGIN * 2 * mean * sum(sizes[number] for number in short):
            wasted += x.shape[0]
            continue
        found.append(Split(long, short, centroids))
        unused, rows = unused[len(short) :], rows + count
    return Splits(found, rows, wasted, too_long)


def _replaced(sizes: Sequence[int], long: int, unused: Sequence[int], mean: float) -> list[int]:
    """The lists, of `unused` ones by ascending length, whose numbers the parts of the list `long` get."""
    size = sizes[long]
    parts = min(size, int(size / mean + 0.5)) if size else 0
    pairs = zip(range(1, parts), unused, strict=False)  # one part more than so many, for one list less
    return [
        short
        for count, short in itertools.takewhile(
            lambda pair: size**2 / (pair[0] * (pair[0] + 1)) > _MARGIN * 2 * mean * sizes[pair[1]], pairs
        )
    ]


def _saved(size: int, x: Tensor, centroids: Tensor, metric: str) -> float:
    """By how much the sum of squared lengths falls if a list of `size` rows like x (S, d) is split."""
    coarse = coarse_of(centroids, metric)
    assigned = nearest_by_ranking(metrics.shift(x, coarse.origin, metric), coarse)[1]
    shares = torch.bincount(assigned, minlength=centroids.shape[0]).double() / x.shape[0]
    return float(size**2 * (1 - shares.square().sum()))


def find_merges(splits: Splits, coarse: Coarse, metric: str) -> dict[int, int]:
    """The list that each short one is merged with: of the nearest to it the first that stays, if there is one."""
    short = [number for split in splits.splits for number in split.short]
    changed = {*short, *(split.long for split in splits.splits)}
    if not short:
        return {}
    near = probe(coarse.centroids[short], coarse, _NEIGHBOURS, metric)[1].tolist()
    staying = [[other for other in row if other not in changed] for row in near]
    return {number: others[0] for number, others in zip(short, staying, strict=True) if others}


def neighbours(
    splits: Splits, merges: dict[int, int], sizes: Sequence[int], coarse: Coarse, metric: str, max_rows: int
) -> list[int]:
    """The lists that get short ones, then those near the parts of split ones, whose rows may be nearer to a part.

    As many as have `max_rows` rows together with the split lists.
    """
    if not splits.splits:
        return []
    centroids = torch.cat([split.centroids for split in splits.splits])
    near = probe(centroids, coarse, _NEIGHBOURS, metric)[1]  # (P, _NEIGHBOURS)
    used = {number for split in splits.splits for number in (split.long, *split.short)}
    order = dict.fromkeys([*merges.values(), *near.t().flatten().tolist()])
    others = [number for number in order if number not in used]
    totals = itertools.accumulate((sizes[number] for number in others), initial=splits.rows + splits.wasted)
    return [number for number, total in zip(others, list(totals)[1:], strict=True) if total <= max_rows]


def outdated(sizes: Tensor, fitted: Tensor, used: Sequence[int], max_rows: int) -> list[int]:
    """The lists, without `used` ones, whose centroids are out of date: those that have changed most come first.

    A list of `sizes` (L,) rows had `fitted` (L,) when its centroid was computed. As many as have `max_rows` rows.
    """
    changed = (sizes - fitted).abs() / sizes.clamp(min=1)
    changed[torch.tensor(used, dtype=torch.int64, device="cpu").to(sizes.device)] = 0
    changed[sizes == 0] = 0
    order = changed.argsort(descending=True, stable=True)
    order = order[: int((changed > _CHANGED).sum())]
    return order[sizes[order].cumsum(0) <= max_rows].tolist()


def numbered(splits: Sequence[Split]) -> Iterator[tuple[int, Tensor]]:
    """The numbers of the lists that get other centroids, and the centroids (d,)."""
    for split in splits:
        yield from zip((split.long, *split.short), split.centroids, strict=True)


def _start(splits: Splits, merges: dict[int, int], sizes: Sequence[int], centroids: Tensor, metric: str) -> Tensor:
    """The centroids (L, d) of merged lists, each the mean of all their rows, and of the parts of split lists.

    Without these means the rows of a short list would be divided among all lists around it.
    """
    centroids, rows, merged = centroids.clone(), list(sizes), list(merges.values())
    for number, other in merges.items():
        rows[other] += rows[number]
        centroids[other].lerp_(centroids[number], rows[number] / max(1, rows[other]))
    centroids[merged] = metrics.on_sphere(centroids[merged], metric)
    for number, centroid in numbered(splits.splits):
        centroids[number] = centroid
    return centroids
