"""The formats an index is exported to, side by side: time a batch, size of the file, agreement with the index."""

from __future__ import annotations

import tempfile
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from ..context import Context
from ..engines import IVF
from ..measure import interleave, rotation, timed

__all__ = ["run"]

_SMALL, _LARGE = (1, 8, 32), (512, 2_048)
# name, format (None: torch.compile in this process), settings of the graph, batches
_VARIANTS: tuple[tuple[str, str | None, dict[str, Any], tuple[int, ...]], ...] = (
    ("compiled, rows", None, {"layout": "rows"}, _SMALL),
    ("compiled, tiles", None, {"layout": "tiles"}, _SMALL),
    ("compiled, float16 tiles", None, {"layout": "tiles", "storage": "float16"}, _SMALL),
    ("aoti, tiles", "aoti", {"layout": "tiles"}, _SMALL),
    ("aoti, float16 tiles", "aoti", {"layout": "tiles", "storage": "float16"}, _SMALL),
    ("exported, rows", "exported", {"layout": "rows"}, _SMALL),
    ("torchscript, rows", "torchscript", {"layout": "rows"}, _SMALL),
    ("torchscript, csr", "torchscript", {"search_mode": "csr"}, (*_SMALL, *_LARGE)),
    ("onnx, rows", "onnx", {"layout": "rows"}, _SMALL),
)
_SUFFIX = {"torchscript": "pt", "exported": "pt2", "aoti": "pt2", "onnx": "onnx"}


def run(ctx: Context) -> None:
    engines = ctx.build_paired(IVF, "ours", "faiss")
    if "ours" not in engines:
        return
    for engine in engines.values():
        engine.set(ctx.case.nprobe)
    native = {name: engine.native(ctx.data.queries) for name, engine in engines.items()}
    index, k = engines["ours"].index, ctx.case.k
    index.k = k
    references = {name: (lambda x, search=engine.search: search(x, k)) for name, engine in engines.items()}
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        made = dict(_made(ctx, index, Path(folder)))
        for nq in (nq for nq in (*_SMALL, *_LARGE) if nq <= len(ctx.data.queries)):
            ctx.note(f"nq {nq:,}")
            calls = {name: made[name][0] for name, _, _, nqs in _VARIANTS if name in made and nq in nqs}
            _measure(ctx, nq, references | calls, native, made)


def _made(ctx: Context, index: Any, folder: Path) -> Iterator[tuple[str, tuple[Callable[..., Any], float, int]]]:
    """Each variant: a search, the seconds it took to make, the bytes of its files."""
    for name, format, settings, _ in _VARIANTS:
        ctx.note(f"making {name}")
        try:
            seconds, (search, size) = timed(lambda f=format, s=settings, n=name: _make(index, f, s, folder / n))
        except Exception as error:  # a format whose packages or compiler are missing
            ctx.skip(name, f"{type(error).__name__}: {str(error).splitlines()[0][:200]}")
            continue
        yield name, (search, seconds, size)


def _make(index: Any, format: str | None, settings: dict[str, Any], path: Path) -> tuple[Callable[..., Any], int]:
    import torch

    from torch_ivf_module import export

    graph_settings = {key: value for key, value in settings.items() if key != "search_mode"}
    if "storage" in graph_settings:
        graph_settings["storage"] = getattr(torch, graph_settings["storage"])
    graph = index.graph(**graph_settings)
    if format is None:
        torch._dynamo.config.recompile_limit = 64  # of all the graphs here together
        return _compiled(torch.compile(graph, fullgraph=True, dynamic=True)), 0
    more = {"search_mode": "csr"} if "search_mode" in settings else {}
    written = export.FORMATS[format](graph, path.with_suffix(f".{_SUFFIX[format]}"), **more)
    run = export.runner(written, format)
    size = sum(file.stat().st_size for file in path.parent.glob(f"{written.name}*"))

    def search(x: Any) -> Any:
        with torch.no_grad():
            return run(x)

    return search, size


def _compiled(graph: Callable[..., Any]) -> Callable[..., Any]:
    import torch

    def search(x: Any) -> Any:
        with torch.no_grad():
            return graph(x)

    return search


def _turn(call: Callable[..., Any], parts: list[Any]) -> Callable[[int], Any]:
    return lambda i: call(parts[i % len(parts)])


def _measure(
    ctx: Context, nq: int, calls: dict[str, Callable[..., Any]], native: dict[str, Any], made: dict[str, Any]
) -> None:
    from torch_ivf_module import export

    parts = {name: rotation(rows, nq) for name, rows in native.items()}
    turns = {name: _turn(call, parts.get(name, parts["ours"])) for name, call in calls.items()}
    expected = calls["ours"](parts["ours"][0])
    for name, timing in interleave(turns, ctx.effort).items():
        facts: dict[str, Any] = {}
        if name in made:
            facts = {"make_seconds": made[name][1], "bytes": made[name][2]}
            facts["agreement"] = export.compare(calls[name](parts["ours"][0]), expected).ids
        ctx.row(name, nq=nq, k=ctx.case.k, qps=nq / timing.seconds, **facts, **timing.fields())
