"""Searches in which each query may find other ids: filters of this library, and selectors of faiss."""

import copy
import functools
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from torch_ivf_module import SearchParams

from .. import answers
from ..context import Context
from ..engines import Variant

SHARES = (0.001, 0.01, 0.1, 0.5)  # of the ids, that a query may find
EXCLUDED = 10  # ids that a query must not find, of all
Answer = tuple[Any, Any]


def query_filters(ctx: Context) -> None:
    """Speed of a search with a filter for each query: masks, lists of ids or groups; in faiss a call for each query."""
    engines = ctx.build_paired("ours", "faiss")
    generator, base = torch.Generator().manual_seed(ctx.case.seed), ctx.data.base
    for share in SHARES:
        groups = torch.randint(round(1 / share), (len(base),), generator=generator)
        grouped = _grouped(engines["ours"], base, groups) if "ours" in engines else None
        for nq in ctx.case.filter_nqs:
            wanted = torch.randint(round(1 / share), (nq,), generator=generator)
            masks = groups == wanted[:, None]
            settings = {
                "masks": SearchParams(selector=masks),
                "lists of ids": SearchParams(selector=[torch.nonzero(mask)[:, 0] for mask in masks]),
                "groups": SearchParams(groups=wanted),
            }
            _time(ctx, engines, nq, share, settings, lambda faiss, q, m=masks: _bitmap(faiss, m[q]), grouped)
    for nq in ctx.case.filter_nqs:
        excluded = torch.randint(len(base), (nq, EXCLUDED), generator=generator)
        settings = {"no filter": SearchParams(), "exclude": SearchParams(exclude=excluded)}
        _time(ctx, engines, nq, 1.0, settings, lambda faiss, q, e=excluded: _without(faiss, e[q]))


def _grouped(engine: Variant, base: np.ndarray, groups: torch.Tensor) -> Any:
    """A copy of the index whose rows have groups."""
    index = copy.deepcopy(engine.index)
    index.reset()
    index.add(engine.convert(base), groups=groups)
    return index


def _time(
    ctx: Context,
    engines: dict[str, Variant],
    nq: int,
    share: float,
    settings: dict[str, SearchParams],
    selector: Callable[[Any, int], Any],
    grouped: Any = None,
) -> None:
    """Time this library with each of the settings, and faiss with the selector of each query.

    `grouped` is the index that settings with groups search.
    """
    ctx.note(f"nq {nq:,}, share {share:g}")
    rows, calls = ctx.data.queries[:nq], {}
    if "ours" in engines:
        x = engines["ours"].convert(rows)
        for name, own in settings.items():
            index = engines["ours"].index if own.groups is None else grouped
            calls[f"ours, {name}"] = functools.partial(_search, index, x, ctx.case.k, own)
    if "faiss" in engines:
        calls["faiss"] = _faiss(ctx, engines["faiss"], rows, selector)
    found = {name: np.asarray(call(0)[1]).astype(np.int64) for name, call in calls.items()}
    facts = {}
    for name, ids in found.items():
        if "faiss" in found and name not in ("faiss", "ours, no filter"):
            same = answers.agreement(ctx.data.base, rows, ids, found["faiss"], ctx.case.metric)
            facts[name] = {"agreement": same}
    ctx.time(calls, len(rows), facts, share=share, nprobe=ctx.case.nprobe)


def _search(index: Any, x: torch.Tensor, k: int, params: SearchParams, i: int) -> Answer:
    found: Answer = index.search(x, k, params=params)
    return found


def _faiss(ctx: Context, engine: Variant, rows: np.ndarray, selector: Callable[[Any, int], Any]) -> Any:
    """A search of all rows in faiss, whose searches have one selector for all queries; made before the clock starts."""
    selectors = [selector(engine.faiss, q) for q in range(len(rows))]
    params = [engine.faiss.SearchParametersIVF(sel=one, nprobe=ctx.case.nprobe) for one in selectors]

    def search(i: int) -> Answer:
        parts = [engine.index.search(rows[q : q + 1], ctx.case.k, params=own) for q, own in enumerate(params)]
        return np.concatenate([part[0] for part in parts]), np.concatenate([part[1] for part in parts])

    return search


def _bitmap(faiss: Any, mask: torch.Tensor) -> Any:
    return faiss.IDSelectorBitmap(np.packbits(mask.numpy(), bitorder="little"))


def _without(faiss: Any, ids: torch.Tensor) -> Any:
    return faiss.IDSelectorNot(faiss.IDSelectorBatch(ids.numpy()))
