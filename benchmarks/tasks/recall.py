"""Recall against queries/s: every library with its own training and its own parameter, and over numbers of lists."""

from collections.abc import Sequence
from dataclasses import replace
from itertools import groupby, zip_longest
from typing import Any

from .. import answers
from ..context import Context
from ..engines import CURVES, QUANTIZED, Variant
from ..measure import timed

_EFFORT = {"cell_seconds": 3.0, "fewest_rounds": 2}  # there are many figures, and a curve shows what one would not
_PARTS = (0.25, 1, 2)  # of the case's nprobe, for indexes of fewer bits
_SLOWEST = 2.5  # seconds for all the checked queries; an engine that needs longer gets no larger values


def recall(ctx: Context) -> None:
    engines = ctx.make(CURVES)
    ctx.note("building")
    built = {}
    for owner in dict.fromkeys(engine.owner for engine in engines.values()):
        steps = (owner.train, ctx.train_rows), (owner.add, owner.convert(ctx.data.base))
        built[owner] = sum(timed(*step)[0] for step in steps)
    rows = {name: engine.convert(ctx.checked) for name, engine in engines.items()}
    for name, engine in engines.items():
        engine.warm(rows[name][:64])
    values = {"nprobe": ctx.case.nprobes, "leaves": ctx.case.nprobes, "ef": ctx.case.efs}
    for step in zip_longest(*(values[engine.parameter] for engine in engines.values())):
        facts: dict[str, dict[str, Any]] = {}
        for (name, engine), value in zip(engines.items(), step, strict=True):
            if name in rows and value is not None:
                facts[name] = {"knob": engine.parameter, "value": value, "build_seconds": built[engine.owner]}
                engine.set(value)
        _curve_point(ctx, {name: engines[name] for name in facts}, rows, facts)


def pairs(ctx: Context) -> None:
    """Recall and speed over pairs of nlist and nprobe, this library and faiss on the same lists."""
    for nlist, wanted in groupby(sorted(ctx.case.ivf), key=lambda pair: pair[0]):
        engines = replace(ctx, case=replace(ctx.case, nlist=nlist)).build_paired("ours", "faiss")
        rows = {name: engine.convert(ctx.checked) for name, engine in engines.items()}
        for _, nprobe in wanted:
            for engine in engines.values():
                engine.set(nprobe)
            facts = {name: {"nlist": nlist, "nprobe": nprobe} for name in rows}
            _curve_point(ctx, {name: engines[name] for name in facts}, rows, facts)


def quantizers(ctx: Context) -> None:
    """Recall@10, speed and memory of list-based indexes that store vectors in fewer bits, on the same lists."""
    ctx = replace(ctx, case=replace(ctx.case, k=10))
    engines, n = ctx.build_paired(table=QUANTIZED), len(ctx.data.base)
    rows, sizes = {name: engine.convert(ctx.data.queries) for name, engine in engines.items()}, {}
    for name, engine in engines.items():
        codes, d = engine.index.store.codes.bytes if name.startswith("ours") else 0, ctx.data.base.shape[1]
        stored = engine.entry.rows.format(half=d // 2)
        sizes[name] = {"stored": stored, "bytes": engine.bytes() / n, "codes": codes / n, "raw": 4 * d}
    for nprobe in (int(part * ctx.case.nprobe) for part in _PARTS):
        facts = {}
        for name in rows:
            engines[name].set(nprobe)
            facts[name] = {"knob": "nprobe", "value": nprobe, "nprobe": nprobe, **sizes[name]}
        nqs = (1, min(2_048, len(ctx.data.queries)))
        _curve_point(ctx, {name: engines[name] for name in facts}, rows, facts, nqs)


def _curve_point(
    ctx: Context, engines: dict[str, Variant], rows: dict[str, Any], facts: dict[str, Any], nqs: Sequence[int] = ()
) -> None:
    """Recall and speed with the values that are set. An engine that takes too long is removed from `rows`."""
    ctx.note(str(next(iter(facts.values()), "")))
    for name, engine in list(engines.items()):
        seconds, answer = timed(engine.search, rows[name][: len(ctx.checked)], ctx.case.k)
        found = engine.ids(answer)
        facts[name]["recall"] = answers.recall(ctx.data.base, ctx.checked, found, ctx.truth, ctx.case.metric)
        if seconds > _SLOWEST:
            reason = f"{len(ctx.checked):,} queries take {seconds:.0f} s; larger values are left out"
            ctx.skip(name, reason, value=facts[name].get("value", facts[name].get("nprobe")))
            del rows[name], engines[name]
    ctx = replace(ctx, effort=replace(ctx.effort, **_EFFORT))
    for nq in nqs or (1, len(ctx.checked)):
        ctx.time({name: ctx.caller(engine, rows[name], nq) for name, engine in engines.items()}, nq, facts)
