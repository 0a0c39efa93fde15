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

_SMALL, _ALL = (1, 8, 32), (1, 8, 32, 512, 2_048)
_HALF = {"layout": "tiles", "storage": torch.float16}
# The format (None: torch.compile in this process), the suffix of its file, settings of the graph, batches.
_VARIANTS: dict[str, tuple[str | None, str, dict[str, Any], tuple[int, ...]]] = {
    "compiled, rows": (None, "", {"layout": "rows"}, _SMALL),
    "compiled, tiles": (None, "", {"layout": "tiles"}, _SMALL),
    "compiled, float16 tiles": (None, "", _HALF, _SMALL),
    "aoti, tiles": ("aoti", ".pt2", {"layout": "tiles"}, _SMALL),
    "aoti, float16 tiles": ("aoti", ".pt2", _HALF, _SMALL),
    "exported, rows": ("exported", ".pt2", {"layout": "rows"}, _SMALL),
    "torchscript, rows": ("torchscript", ".pt", {"layout": "rows"}, _SMALL),
    "torchscript, csr": ("torchscript", ".pt", {"search_mode": "csr"}, _ALL),
    "onnx, rows": ("onnx", ".onnx", {"layout": "rows"}, _SMALL),
}


@torch.no_grad()
def formats(ctx: Context) -> None:
    engines = ctx.build_paired("ours", "faiss")
    if "ours" not in engines:
        return
    index, facts = engines["ours"].index, {}
    index.k = k = ctx.case.k
    rows = {name: engine.convert(ctx.data.queries) for name, engine in engines.items()}
    searches: dict[str, Callable[..., Any]] = {n: lambda x, e=engine: e.search(x, k) for n, engine in engines.items()}
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name, (format, suffix, settings, _) in _VARIANTS.items():
            ctx.note(f"making {name}")
            try:
                seconds, (searches[name], size) = timed(_make, index, format, settings, Path(folder) / (name + suffix))
                facts[name] = {"make_seconds": seconds, "bytes": size}
            except Exception as error:  # a format whose packages or compiler are missing
                ctx.skip(name, f"{type(error).__name__}: {str(error).splitlines()[0][:200]}")
        for nq in (nq for nq in _ALL if nq <= len(ctx.data.queries)):
            ctx.note(f"nq {nq:,}")
            calls, expected = {}, searches["ours"](rows["ours"][:nq])
            for name in (name for name in searches if name in engines or nq in _VARIANTS[name][-1]):
                parts = rotation(rows.get(name, rows["ours"]), nq)
                calls[name] = lambda i, search=searches[name], parts=parts: search(parts[i % len(parts)])
                if name in facts:
                    facts[name]["agreement"] = export.compare(searches[name](parts[0]), expected).ids
            ctx.time(calls, nq, facts)


def _make(index: Any, format: str | None, settings: dict[str, Any], path: Path) -> tuple[Callable[..., Any], int]:
    """A search in the format, and the bytes of its files."""
    mode = {name: value for name, value in settings.items() if name == "search_mode"}
    graph = index.graph(**{name: value for name, value in settings.items() if name not in mode})
    if format is None:
        torch._dynamo.config.recompile_limit = 64  # of all the graphs here together
        return torch.compile(graph, fullgraph=True, dynamic=True), 0
    written = export.FORMATS[format](graph, path, **mode)
    size = sum(file.stat().st_size for file in path.parent.glob(f"{written.name}*"))
    return export.runner(written, format), size
