"""The one top-k: selection by groups, padding, rules for NaN and overflow. Partial results are merged by it too.

Q queries, W scores per query, k results. Higher scores are better; a label is a row or an id, -1 for padding.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from .chunking import tracing

PADDING = -math.inf  # the score of padding, whose label is -1
# On a CPU torch.topk costs 3-5 ns per element and a maximum 0.15 ns, so selecting among group maxima first pays
# if a row has at least this many times as many elements as the two selections read together.
_GROUPING_PAYS = 2
# A maximum over strided members is vectorised over the groups, so if there are fewer groups than this, their number is
# made a multiple of the vector width. For the best of 512 scores: 880 ns by 23 groups, 233 by 32, 640 without groups.
_SHORT = 64
_SMALL = 1 << 14  # up to so many elements one call of top-k takes less time than the overhead of six smaller calls


def select_topk(scores: Tensor, labels: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k highest scores of each row, best first: scores (Q, k) and labels (Q, k), padded with -inf and -1.

    A score that is NaN or infinite, or a label of -1, counts as padding. Differentiable in `scores`.

    >>> select_topk(torch.tensor([[1.0, 3.0, 2.0]]), torch.tensor([[7, 8, 9]]), 2)
    (tensor([[3., 2.]]), tensor([[8, 9]]))
    """
    scores = scores.nan_to_num(nan=PADDING, posinf=PADDING, neginf=PADDING).masked_fill(labels < 0, PADDING)
    best, at = best_positions(scores, k)
    best_labels = labels.gather(1, at).masked_fill(best == PADDING, -1)
    missing = k - best.shape[1]
    if missing > 0:
        best = torch.nn.functional.pad(best, (0, missing), value=PADDING)
        best_labels = torch.nn.functional.pad(best_labels, (0, missing), value=-1)
    return best, best_labels


def merge(results: Sequence[tuple[Tensor, Tensor]], k: int) -> tuple[Tensor, Tensor]:
    """The k best of several results: scores and labels, each (Q, any width)."""
    scores, labels = zip(*results, strict=True)
    return select_topk(torch.cat(scores, 1), torch.cat(labels, 1), k)


def best_positions(scores: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The min(k, W) best of each row of `scores` (Q, W), best first, and their positions. `scores` has no NaN.

    The k best elements all lie in the k groups with the best maxima, so on wide rows the groups are selected
    first and then their members.
    """
    width = scores.shape[1]
    group = _group_size(width, k) if tracing() or scores.numel() > _SMALL else 0
    if group == 0:
        return _top(scores, min(k, width), True)
    groups = width // group
    # Group j holds positions j, j + groups, j + 2 groups, ...: a maximum over strided members vectorises.
    maxima = scores[:, : group * groups].unflatten(1, (group, groups)).amax(1)
    chosen = _top(maxima, k, False)[1]
    steps = torch.arange(group, device=scores.device) * groups
    members = (chosen[:, :, None] + steps).flatten(1)
    ungrouped = torch.arange(group * groups, width, device=scores.device).expand(scores.shape[0], -1)
    members = torch.cat([members, ungrouped], 1)
    best, at = _top(scores.gather(1, members), k, True)
    return best, members.gather(1, at)


def _top(scores: Tensor, k: int, ordered: bool) -> tuple[Tensor, Tensor]:
    """Values and positions of the k best of each row."""
    if k == 1:  # a maximum takes a quarter of the time of a top-1
        return torch.max(scores, dim=1, keepdim=True)
    return torch.topk(scores, k, dim=1, sorted=ordered)


def _group_size(width: int, k: int) -> int:
    """Members per group: the size that reads the fewest elements, or 0 where plain top-k is as good."""
    group = math.isqrt(max(width // max(k, 1), 0))
    if width // max(group, 1) < _SHORT:
        group = 1 << (group.bit_length() - 1) if group else 0
    if group < 2 or _GROUPING_PAYS * (width // group + k * group) > width:
        return 0
    return group
