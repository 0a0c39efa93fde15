"""Filters and groups of each query, in the forms that SearchParams takes, and the rows that they let through.

Q queries, N rows, n ids of a mask, m excluded ids.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

SELECTORS = ("masks", "short masks", "lists", "few ids", "empty lists")
EXCLUSIONS = ("some", "few", "everything", "nothing")
GROUPS = ("few", "own", "one")
FEW_GROUPS = torch.tensor([5, 5, 5, 5, 7, 7, -3, 2**62, -1])
UNKNOWN = torch.tensor([10**9 + 7, -9, -1, 2**62 + 1])


def selector_of(form: str, ids: Tensor, queries: int, seed: int) -> Tensor | tuple[Tensor, ...]:
    """A selector of each query for rows of these ids (N,): masks (Q, n), or Q lists of ids, some of them unknown."""
    generator = torch.Generator().manual_seed(seed)
    if form.endswith("masks") or not queries:
        return torch.rand(queries, 7 if form == "short masks" else 90, generator=generator) < 0.4
    share = {"lists": 0.4, "few ids": 3 / max(3, len(ids)), "empty lists": 0.0}[form]
    lists = (ids[torch.rand(len(ids), generator=generator) < share] for _ in range(queries))
    return tuple(torch.cat([UNKNOWN, part, part[:2]]) if q % 2 else part for q, part in enumerate(lists))


def exclusions_of(form: str, ids: Tensor, queries: int, seed: int) -> Tensor:
    """Ids (Q, m) that each query must not find, unknown ones and -1 among them."""
    generator = torch.Generator().manual_seed(seed + 1)
    if form == "everything":
        return ids.expand(queries, -1)
    width = {"some": len(ids) // 2, "few": 3, "nothing": 0}[form]
    known = torch.cat([ids, UNKNOWN])
    return known[torch.randint(0, len(known), (queries, width), generator=generator)]


def passing(ids: Tensor, queries: int, selector: Any = None, exclude: Tensor | None = None) -> Tensor:
    """Which ids (N,) each query may find, bool (Q, N), one by one. `selector` is None, or as SearchParams takes it."""
    found = torch.ones(queries, len(ids), dtype=torch.bool)
    shared = isinstance(selector, Tensor) and selector.dim() == 1
    for q in range(queries):
        if selector is not None:
            own = selector if shared else selector[q]
            found[q] &= torch.isin(ids, own.nonzero()[:, 0] if own.dtype == torch.bool else own)
        if exclude is not None:
            found[q] &= ~torch.isin(ids, exclude[q])
    return found


def groups_of(style: str | None, rows: int, seed: int) -> Tensor | None:
    """Groups (rows,) int64: a few that are large and -1, one for each row, or one of any size."""
    generator = torch.Generator().manual_seed(seed + 2)
    return {
        "few": lambda: FEW_GROUPS[torch.randint(0, len(FEW_GROUPS), (rows,), generator=generator)],
        "own": lambda: torch.arange(rows) - 3,
        "one": lambda: torch.randint(0, 9, (1,), generator=generator).repeat(rows),
    }.get(style or "", lambda: None)()
