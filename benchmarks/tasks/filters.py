"""Searches in which each query may find other ids: filters of this library, and selectors of faiss."""

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
    """Speed of a search with a filter for each query, given as masks and as lists of ids; in faiss a call a query."""
    engines = ctx.build_paired("ours", "faiss")
    generator = torch.Generator().manual_seed(ctx.case.seed)
    for nq in ctx.case.filter_nqs:
        rows = ctx.data.queries[:nq]
        for share in SHARES:
            masks = torch.rand(nq, len(ctx.data.base), generator=generator) < share
            lists = [torch.nonzero(mask)[:, 0] for mask in masks]
            settings = {"masks": SearchParams(selector=masks), "lists of ids": SearchParams(selector=lists)}
            _time(ctx, engines, rows, share, settings, lambda faiss, q, m=masks: _bitmap(faiss, m[q]))
        excluded = torch.randint(len(ctx.data.base), (nq, EXCLUDED), generator=generator)
        settings = {"no filter": SearchParams(), "exclude": SearchParams(exclude=excluded)}
        _time(ctx, engines, rows, 1.0, settings, lambda faiss, q, e=excluded: _without(faiss, e[q]))


def _time(
    ctx: Context,
    engines: dict[str, Variant],
    rows: np.ndarray,
    share: float,
    settings: dict[str, SearchParams],
    selector: Callable[[Any, int], Any],
) -> None:
    """Time this library with each of the settings, and faiss with the selector of each query."""
    ctx.note(f"nq {len(rows):,}, share {share:g}")
    calls: dict[str, Callable[[int], Answer]] = {}
    if "ours" in engines:
        x, search = engines["ours"].convert(rows), engines["ours"].index.search
        calls = {f"ours, {name}": lambda i, p=p: search(x, ctx.case.k, params=p) for name, p in settings.items()}
    if "faiss" in engines:
        calls["faiss"] = _faiss(ctx, engines["faiss"], rows, selector)
    found = {name: np.asarray(call(0)[1]).astype(np.int64) for name, call in calls.items()}
    facts = {}
    for name, ids in found.items():
        if "faiss" in found and name not in ("faiss", "ours, no filter"):
            same = answers.agreement(ctx.data.base, rows, ids, found["faiss"], ctx.case.metric)
            facts[name] = {"agreement": same}
    ctx.time(calls, len(rows), facts, share=share, nprobe=ctx.case.nprobe)


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
