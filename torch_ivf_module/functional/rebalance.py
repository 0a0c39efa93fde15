"""Which inverted lists to split, and where the centroids of the parts are.

L lists, d dim, P parts of a list, S sampled rows.
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
_NEIGHBOURS = 8  # lists nearest to each new centroid whose rows may be nearer to it
# Moving the b rows of a list to others, of about the mean length m, adds 2 b m to the sum of squared lengths, which is
# what searches read. Splitting has to save twice that.
_MARGIN = 2
_CHANGED = 0.05  # part of the rows of a list, from which on its centroid is out of date


class Split(NamedTuple):
    """A list that becomes several: its rows and its number are shared with lists that are dissolved."""

    long: int  # the list that is split
    short: list[int]  # P - 1 lists whose numbers the other parts get
    centroids: Tensor  # (P, d) float32


class Splits(NamedTuple):
    """What `find_splits` found."""

    splits: list[Split]
    rows: int  # in the lists of the splits
    wasted: int  # rows that were sampled from lists that cannot be split
    too_long: int  # lists that were left since they have more rows than may be read


def imbalance_of(sizes: Tensor) -> float:
    """``L * sum(sizes ** 2) / sum(sizes) ** 2`` of list lengths (L,); 1 without rows.

    >>> imbalance_of(torch.tensor([4, 4])), imbalance_of(torch.tensor([8, 0]))
    (1.0, 2.0)
    """
    sizes = sizes.double()
    total = sizes.sum().square()
    return float(sizes.shape[0] * sizes.square().sum() / total) if float(total) else 1.0


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


def neighbours(splits: Splits, sizes: Sequence[int], coarse: Coarse, metric: str, max_rows: int) -> list[int]:
    """The lists, of those near the parts of split ones, whose rows may be nearer to a part: nearest first.

    As many as have `max_rows` rows together with the split lists.
    """
    if not splits.splits:
        return []
    centroids = torch.cat([split.centroids for split in splits.splits])
    near = probe(centroids, coarse, _NEIGHBOURS, metric)[1]  # (P, _NEIGHBOURS)
    used = {number for split in splits.splits for number in (split.long, *split.short)}
    others = [number for number in dict.fromkeys(near.t().flatten().tolist()) if number not in used]
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
