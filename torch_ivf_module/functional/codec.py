"""8-bit codes of rows, and the bound of the error of scores that are computed from them.

A row v of a list with centre c is coded as ``c + scale * code``: the code (d,) int8 of the residual ``r = v - c``, and
one scale. A query is coded in the same way for each list that it reads, so that their product is one of small integers.
docs/codes.md derives the bound. The kernel makes and reads `Codes`; the functions here are the readable reference.
Q queries, L lists, P panels, d dim, n rows of one list.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from . import metric as metrics

PANEL = 32  # rows of a panel: two vectors of 16 sums
RUN = 1 << 16  # rows of a list that are sorted together: their numbers fit 16 bits
LARGEST = 127  # the largest code of either sign
_SLACK = 2.0**-20  # more than the rounding errors of computing the norm of an error, relative to it and to the scale
MOST_DIM = 1 << 15  # dimension up to which the sums of a product fit 32 bits
_HEAD = PANEL * (4 + 4 + 2)  # bytes of a panel before its codes


class Codes(NamedTuple):
    """The codes of all rows of some lists, on the CPU and contiguous.

    The rows of a list are sorted by the norm of their residual within runs of RUN rows, and divided into panels. A
    panel is 32 float32 scales, 32 float32 halves of squared norms of residuals (rounded up), 32 uint16 row numbers (the
    row in its list, less the first row of its run), and ceil(d / 4) x 32 x 4 unsigned bytes: the codes + 128. Places
    after the last row of a list have a scale of NaN.
    """

    centres: Tensor  # (L, d) float32: the mean of the rows of each list, without outliers
    panels: Tensor  # (B,) uint8: all panels, list by list
    first: Tensor  # (L + 1,) int64: the number of the first panel of each list
    norms: Tensor  # (P, 2) float32: lower and upper bound of the norms of the residuals of a panel
    # (L, 3) float32: an upper bound of the norm of the error of a row divided by its scale, NaN for a list with a
    # row that is too large for codes; a typical norm of the residuals; an upper bound of the norm of the centre
    limits: Tensor

    @property
    def bytes(self) -> int:
        """Memory of all tensors."""
        return sum(tensor.nbytes for tensor in self)


class ListCodes(NamedTuple):
    """The codes of one list, in the order of its panels."""

    rows: Tensor  # (n,) int64: the row in its list
    codes: Tensor  # (n, d) int8
    scales: Tensor  # (n,) float32
    half_squares: Tensor  # (n,) float32: at least half of the squared norm of the residual


def panel_bytes(d: int) -> int:
    """Bytes of a panel of rows of dimension d.

    >>> panel_bytes(128) / PANEL
    138.0
    """
    return _HEAD + -(-d // 4) * 4 * PANEL


def encode(rows: Tensor, centre: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Codes (n, d) int8 from -127 to 127, scales (n,) and upper bounds (n,) of the norms of the errors, float32.

    rows (n, d) and centre (d,) float32, finite; a query is coded by the same function. The error of a row is
    ``(row - centre) - scale * code``.

    >>> codes, scale, error = encode(torch.tensor([[3.0, -1.0]]), torch.zeros(2))
    >>> codes, bool(error <= scale)
    (tensor([[127, -42]], dtype=torch.int8), True)
    """
    residual = rows.double() - centre.double()  # in float32 it could overflow, and would be rounded
    largest = residual.abs().amax(1, keepdim=True) if rows.shape[1] else residual.new_zeros(rows.shape[0], 1)
    # Not below the smallest normal number, so that codes of tiny rows are finite; a row of zeros has codes of zeros.
    scale = (largest / LARGEST).float().clamp(min=torch.finfo(torch.float32).tiny)
    codes = (residual / scale).round().clamp(-LARGEST, LARGEST)
    error = torch.linalg.vector_norm(residual - codes * scale.double(), dim=1)
    bound = error * (1 + _SLACK) + scale[:, 0].double() * _SLACK
    return codes.to(torch.int8), scale[:, 0], bound.float()


def decode(codes: Tensor, scale: Tensor, centre: Tensor) -> Tensor:
    """The rows (n, d) float32 that codes (n, d) with scales (n,) stand for, up to float32 rounding.

    >>> decode(torch.tensor([[127, -42]]), torch.tensor([0.5]), torch.ones(2))
    tensor([[ 64.5000, -20.0000]])
    """
    return centre + scale[:, None] * codes


def unpack(codes: Codes, number: int) -> ListCodes:
    """The codes of the list of this number."""
    d = codes.centres.shape[1]
    size = panel_bytes(d)
    start, end = codes.first[number : number + 2].tolist()
    panels = codes.panels[start * size : end * size].view(-1, size)
    scales, half_squares = (_column(panels, at, torch.float32) for at in (0, 4 * PANEL))
    run = torch.arange(panels.shape[0]) * PANEL // RUN * RUN
    rows = (_column(panels, 8 * PANEL, torch.uint16).long().view(-1, PANEL) + run[:, None]).flatten()
    groups = panels[:, _HEAD:].reshape(-1, -(-d // 4), PANEL, 4).transpose(1, 2)
    unsigned = groups.flatten(2).flatten(0, 1)[:, :d]
    used = ~scales.isnan()
    return ListCodes(rows[used], (unsigned[used].short() - 128).to(torch.int8), scales[used], half_squares[used])


def _column(panels: Tensor, start: int, dtype: torch.dtype) -> Tensor:
    """One number of each row of all panels, (P * PANEL,): those from byte `start` of a panel on."""
    return panels[:, start : start + PANEL * dtype.itemsize].contiguous().view(dtype).flatten()


def product_error(query_error: Tensor, query_norm: Tensor, row_error: Tensor, row_norm: Tensor) -> Tensor:
    """An upper bound of ``|<a, r> - <a', r'>|`` for coded a' and r'.

    ``query_error >= |a - a'|``, ``query_norm >= |a'|``, ``row_error >= |r - r'|`` and ``row_norm >= |r|``.
    """
    return query_error * row_norm + query_norm * row_error


def norm_bound(half_squares: Tensor, g: Tensor) -> Tensor:
    """An upper bound of norms, linear in the halves of their squares; equal to a norm that is g > 0."""
    return g / 2 + half_squares / g


def score_bounds(x: Tensor, centre: Tensor, coded: ListCodes, limits: Tensor, metric: str) -> tuple[Tensor, Tensor]:
    """Lower and upper bounds (Q, n) float64 of the scores of the rows of one list, for queries x (Q, d) float32.

    `limits` (3,) are those of the list in `Codes`. The score is minus half of the squared distance, or the product.
    The exact score of a row lies between its bounds also as computed in float32 by `metric.exact_scores`.
    """
    differences = metrics.by_differences(metric)
    kappa, g = limits[0].double(), limits[1].double().clamp(min=torch.finfo(torch.float32).tiny)
    origin = centre if differences else torch.zeros_like(centre)
    codes, scale, error = encode(x, origin)
    a, near = x.double() - origin.double(), scale[:, None].double() * codes.double()
    scales, half_squares = coded.scales.double(), coded.half_squares.double()
    products = near @ (scales[:, None] * coded.codes.double()).t()
    size, norms = torch.linalg.vector_norm(a, dim=1)[:, None], norm_bound(half_squares, g)
    query_norm = torch.linalg.vector_norm(near, dim=1)[:, None]
    off = product_error(error[:, None].double(), query_norm, kappa * scales, norms)
    if differences:
        scores = products - size.square() / 2 - half_squares
        magnitude = size.square() + 2 * half_squares
    else:
        scores = products + (x.double() @ centre.double())[:, None]
        magnitude = size * (limits[2].double() + norms)
    # Rounding errors are relative, except those of numbers below the smallest normal one.
    off = off + 2 * metrics.rounding(x.shape[1]) * magnitude + x.shape[1] * torch.finfo(torch.float32).tiny
    # A square that overflows float32 is inf, and says nothing of the row; nor does NaN, of a list without codes.
    return (scores - off).nan_to_num(nan=-math.inf), (scores + off).nan_to_num(nan=math.inf)


def candidates(lower: Tensor, upper: Tensor, k: int) -> Tensor:
    """Which rows (Q, n) may be among the k of highest score: those whose upper bound reaches the k-th best lower bound.

    >>> candidates(torch.tensor([[5.0, 1.0, 3.0]]), torch.tensor([[6.0, 2.0, 5.5]]), 1)
    tensor([[ True, False,  True]])
    """
    if k >= lower.shape[1]:
        return torch.ones_like(lower, dtype=torch.bool)
    return upper >= lower.topk(k, dim=1).values[:, -1:]
