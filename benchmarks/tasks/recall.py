"""Recall against queries/s: every library with its own training and its own knob, and over numbers of lists."""

from __future__ import annotations

from dataclasses import replace
from itertools import groupby, zip_longest
from typing import Any

from .. import answers
from ..context import Context
from ..engines import FLAT, GRAPH, IVF, Engine, Variant, owners
from ..measure import Timing, interleave, rotation, timed

__all__ = ["pairs", "run"]

# A mode that only differs in speed from another one of the same library adds nothing to this picture.
_LISTS = ("ours", "faiss", "torch-ivf", "torch-similarity-search")
_EXHAUSTIVE = ("sklearn",)
_PAIRED = ("ours", "faiss")
_EFFORT = {"cell_seconds": 4.0, "fewest_rounds": 2}  # there are many figures, and a curve shows what one would not
_SLOWEST = 2.0  # seconds for all the checked queries; an engine that needs longer is not driven any further


def run(ctx: Context) -> None:
    engines = {**ctx.make(IVF, *_LISTS), **ctx.make(GRAPH), **ctx.make(FLAT, *_EXHAUSTIVE)}
    built = {id(engine): _build(ctx, name, engine) for name, engine in owners(engines).items()}
    native = {name: engine.native(ctx.checked) for name, engine in engines.items()}
    settings = {"nprobe": ctx.case.nprobes, "ef": ctx.case.efs, None: (0,)}
    for step in zip_longest(*(settings[engine.knob] for engine in engines.values())):
        values = dict(zip(engines, step, strict=True))
        now = [name for name in native if values[name] is not None]
        for name in now:
            if engines[name].knob is not None:
                engines[name].set(values[name])
        ctx.note(", ".join(sorted({f"{engines[name].knob} {values[name]}" for name in now if values[name]})))
        shares = {name: _share(ctx, name, engines[name], native, values[name]) for name in now}
        for nq in (1, len(ctx.checked)):
            for name, timing in _times(ctx, {n: engines[n] for n in now if n in native}, native, nq).items():
                knob = {"knob": engines[name].knob, "value": values[name]}
                speed = {"nq": nq, "k": ctx.case.k, "qps": nq / timing.seconds, **timing.fields()}
                ctx.row(
                    name, **knob, recall=shares[name], build_seconds=built[id(engines[name].owner)], **speed
                )


def pairs(ctx: Context) -> None:
    """Recall and speed over pairs of nlist and nprobe, this library and faiss on the same lists."""
    for nlist, wanted in groupby(sorted(ctx.case.ivf), key=lambda pair: pair[0]):
        engines = replace(ctx, case=replace(ctx.case, nlist=nlist)).build_paired(IVF, *_PAIRED)
        native = {name: engine.native(ctx.checked) for name, engine in engines.items()}
        for _, nprobe in wanted:
            ctx.note(f"nlist {nlist:,}, nprobe {nprobe}")
            for engine in engines.values():
                engine.set(nprobe)
            shares = {name: _share(ctx, name, engines[name], native, nprobe) for name in list(native)}
            for nq in (1, len(ctx.checked)):
                for name, timing in _times(ctx, {name: engines[name] for name in native}, native, nq).items():
                    speed = {"nq": nq, "k": ctx.case.k, "qps": nq / timing.seconds, **timing.fields()}
                    ctx.row(name, nlist=nlist, nprobe=nprobe, recall=shares[name], **speed)


def _build(ctx: Context, name: str, engine: Engine) -> float:
    ctx.note(f"building {name}")
    rows = engine.native(ctx.data.base)

    def build() -> None:
        engine.train(ctx.train_rows)
        engine.add(rows)

    return timed(build)[0]


def _share(ctx: Context, name: str, engine: Variant, native: dict[str, Any], value: int) -> float:
    """Recall over the checked queries. An engine that takes too long for them is dropped from `native`."""
    seconds, answer = timed(lambda: engine.search(native[name], ctx.case.k))
    if seconds > _SLOWEST:
        ctx.skip(name, f"{len(ctx.checked):,} queries take {seconds:.0f} s; not driven further", value=value)
        del native[name]
    return answers.recall(ctx.data.base, ctx.checked, engine.ids(answer), ctx.truth, ctx.case.metric)


def _times(ctx: Context, engines: dict[str, Variant], native: dict[str, Any], nq: int) -> dict[str, Timing]:
    def caller(name: str) -> Any:
        parts, search, k = rotation(native[name], nq), engines[name].search, ctx.case.k
        return lambda i: search(parts[i % len(parts)], k)

    return interleave({name: caller(name) for name in engines}, replace(ctx.effort, **_EFFORT)) if engines else {}
