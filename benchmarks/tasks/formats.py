"""The formats an index is exported to: time per batch, size of the files, agreement with the index."""

import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from torch_ivf_module import export

from ..context import Context
from ..measure import rotation, timed

_SMALL, _LARGE = (1, 8, 32), (512, 2_048)
# name, format (None: torch.compile in this process), settings of the graph, batches
_VARIANTS: tuple[tuple[str, str | None, dict[str, Any], tuple[int, ...]], ...] = (
    ("compiled, rows", None, {"layout": "rows"}, _SMALL),
    ("compiled, tiles", None, {"layout": "tiles"}, _SMALL),
    ("compiled, float16 tiles", None, {"layout": "tiles", "storage": torch.float16}, _SMALL),
    ("aoti, tiles", "aoti", {"layout": "tiles"}, _SMALL),
    ("aoti, float16 tiles", "aoti", {"layout": "tiles", "storage": torch.float16}, _SMALL),
    ("exported, rows", "exported", {"layout": "rows"}, _SMALL),
    ("torchscript, rows", "torchscript", {"layout": "rows"}, _SMALL),
    ("torchscript, csr", "torchscript", {"search_mode": "csr"}, (*_SMALL, *_LARGE)),
    ("onnx, rows", "onnx", {"layout": "rows"}, _SMALL),
)
_SUFFIX = {"torchscript": "pt", "exported": "pt2", "aoti": "pt2", "onnx": "onnx"}
Search = Callable[[Any], Any]


def run(ctx: Context) -> None:
    engines = ctx.build_paired("ours", "faiss")
    if "ours" not in engines:
        return
    k, index = ctx.case.k, engines["ours"].index
    index.k = k
    rows = {name: engine.convert(ctx.data.queries) for name, engine in engines.items()}
    searches: dict[str, Search] = {n: (lambda x, engine=engine: engine.search(x, k)) for n, engine in engines.items()}
    facts: dict[str, dict[str, Any]] = {}
    batches = {**dict.fromkeys(engines, (*_SMALL, *_LARGE)), **{name: nqs for name, _, _, nqs in _VARIANTS}}
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        for name, format, settings, _ in _VARIANTS:
            ctx.note(f"making {name}")
            try:
                seconds, made = timed(_make, index, format, settings, Path(folder) / name)
            except Exception as error:  # a format whose packages or compiler are missing
                ctx.skip(name, f"{type(error).__name__}: {str(error).splitlines()[0][:200]}")
                continue
            searches[name], facts[name] = made[0], {"make_seconds": seconds, "bytes": made[1]}
        for nq in (nq for nq in (*_SMALL, *_LARGE) if nq <= len(ctx.data.queries)):
            ctx.note(f"nq {nq:,}")
            parts = {name: rotation(given, nq) for name, given in rows.items()}
            calls = {}
            for name in (name for name in searches if nq in batches[name]):
                own = parts.get(name, parts["ours"])
                calls[name] = lambda i, search=searches[name], own=own: search(own[i % len(own)])
            expected = searches["ours"](parts["ours"][0])
            for name in calls.keys() & facts.keys():
                facts[name]["agreement"] = export.compare(searches[name](parts["ours"][0]), expected).ids
            ctx.time(calls, nq, facts=facts)


def _make(index: Any, format: str | None, settings: dict[str, Any], path: Path) -> tuple[Search, int]:
    """A search in the format, and the bytes of its files."""
    mode = {name: value for name, value in settings.items() if name == "search_mode"}
    graph = index.graph(**{name: value for name, value in settings.items() if name not in mode})
    if format is None:
        torch._dynamo.config.recompile_limit = 64  # of all the graphs here together
        return torch.compile(graph, fullgraph=True, dynamic=True), 0
    written = export.FORMATS[format](graph, path.with_suffix(f".{_SUFFIX[format]}"), **mode)
    size = sum(file.stat().st_size for file in path.parent.glob(f"{written.name}*"))
    return export.runner(written, format), size
