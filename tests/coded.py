"""Codes made by the reference functions, as the kernel stores them. L lists, P panels, d dim, n rows of a list."""

from __future__ import annotations

import torch
from torch import Tensor

from torch_ivf_module.functional.codec import PANEL, RUN, Codes, ListCodes, encode


def coded_list(rows: Tensor) -> tuple[Tensor, ListCodes, Tensor, Tensor]:
    """Of a list of rows (n, d): its centre (d,), codes and limits (3,), and the norms (n,) float64 of the residuals."""
    rows = rows.float()
    centre = rows.double().mean(0).float() if rows.shape[0] else rows.new_zeros(rows.shape[1])
    norms = torch.linalg.vector_norm(rows.double() - centre.double(), dim=1)
    order = torch.cat([number * RUN + run.argsort() for number, run in enumerate(norms.split(RUN))])
    norms = norms[order]
    codes, scales, errors = encode(rows[order], centre)
    limits = [0.0] * 3
    if rows.shape[0]:
        kappa, size = (errors.double() / scales).amax(), torch.linalg.vector_norm(centre.double())
        limits = [kappa, norms.square().mean().sqrt(), size]
    halves = _up(norms.square() / 2)
    return centre, ListCodes(order, codes, scales, halves), _up(torch.tensor(limits, dtype=torch.float64)), norms


def reference_codes(packed: Tensor, offsets: Tensor, sizes: Tensor) -> Codes:
    """What the operator encode_lists returns, up to rounding: packed (N, d), offsets and sizes (L + 1,)."""
    centres, panels, first, bounds, limits = [], [], [0], [torch.empty(0, 2)], []
    for start, size in zip(offsets.tolist()[:-1], sizes.tolist(), strict=False):
        centre, coded, limit, norms = coded_list(packed[start : start + size])
        groups = list(range(0, size, PANEL))
        panels += [_panel(ListCodes(*(column[at : at + PANEL] for column in coded))) for at in groups]
        bounds += [torch.stack([-_up(-norms[at]), _up(norms[at : at + PANEL].amax())])[None] for at in groups]
        centres.append(centre)
        limits.append(limit)
        first.append(first[-1] + len(groups))
    joined = torch.cat([torch.empty(0, dtype=torch.uint8), *panels])
    return Codes(torch.stack(centres), joined, torch.tensor(first), torch.cat(bounds), torch.stack(limits))


def _panel(rows: ListCodes) -> Tensor:
    """The bytes of a panel of at most PANEL rows."""
    missing, groups = PANEL - len(rows.rows), -(-rows.codes.shape[1] // 4)
    pad = torch.nn.functional.pad
    unsigned = pad(rows.codes.short() + 128, (0, 4 * groups - rows.codes.shape[1], 0, missing), value=128)
    parts = [
        pad(rows.scales, (0, missing), value=torch.nan),
        pad(rows.half_squares, (0, missing)),
        pad(rows.rows % RUN, (0, missing)).to(torch.uint16),
        unsigned.to(torch.uint8).view(PANEL, groups, 4).transpose(0, 1).contiguous(),
    ]
    return torch.cat([part.view(torch.uint8).flatten() for part in parts])


def _up(values: Tensor) -> Tensor:
    """float64 values in float32, rounded up by at least one unit in the last place."""
    return torch.nextafter(values.float(), torch.tensor(torch.inf))
