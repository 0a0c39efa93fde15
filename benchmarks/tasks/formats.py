"""An index in models, compiled and eager, and in the files of its graph: time per batch, beside searching it."""

import copy
import tempfile
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from torch_ivf_module import export

from ..context import Context
from ..measure import rotation, timed

_SMALL, _ALL = (1, 8, 32), (1, 8, 32, 512, 2_048)  # a graph reads as many rows of every list as the longest has
_EFFORT = {"cell_seconds": 4.0, "fewest_rounds": 2}  # of compiled models: the eager one shows how stable figures are
# The format, the suffix of its file, settings of the graph, batches.
_VARIANTS: dict[str, tuple[str, str, dict[str, Any], tuple[int, ...]]] = {
    "aoti, tiles": ("aoti", ".pt2", {"layout": "tiles"}, _SMALL),
    "aoti, float16 tiles": ("aoti", ".pt2", {"layout": "tiles", "storage": torch.float16}, _SMALL),
    "exported, rows": ("exported", ".pt2", {"layout": "rows"}, _SMALL),
    "torchscript, rows": ("torchscript", ".pt", {"layout": "rows"}, _SMALL),
    "torchscript, csr": ("torchscript", ".pt", {"search_mode": "csr"}, _ALL),
    "onnx, rows": ("onnx", ".onnx", {"layout": "rows"}, _SMALL),
}
Search = Callable[[Any], Any]


@torch.no_grad()
def formats(ctx: Context) -> None:
    engines = ctx.build_paired("ours", "faiss")
    if "ours" not in engines:
        return
    index, facts = engines["ours"].index, {}
    index.k = k = ctx.case.k
    searches: dict[str, Search] = {name: lambda x, e=engine: e.search(x, k) for name, engine in engines.items()}
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name, (format, suffix, settings, _) in _VARIANTS.items():
            if format == "onnx" and index.device.type != "cpu":
                ctx.skip(name, "its runner is on the CPU")
                continue
            ctx.note(f"making {name}")
            path = Path(folder) / (name + suffix)
            made = ctx.attempt(name, timed, _file, index, format, settings, path)  # packages or a compiler may lack
            if made is not None:
                seconds, (searches[name], size) = made
                facts[name] = {"make_seconds": seconds, "bytes": size}
        rows = {name: engine.convert(ctx.data.queries) for name, engine in engines.items()}
        sizes = {name: _VARIANTS[name][-1] if name in _VARIANTS else _ALL for name in searches}
        _time(ctx, searches, {name: rows.get(name, rows["ours"]) for name in searches}, sizes, facts)


def _file(index: Any, format: str, settings: dict[str, Any], path: Path) -> tuple[Search, int]:
    """A search in the format, and the bytes of its files."""
    mode = settings if "search_mode" in settings else {}  # which is that of the file, not of the graph
    written = export.FORMATS[format](index.graph(**({} if mode else settings)), path, **mode)
    size = sum(file.stat().st_size for file in path.parent.glob(f"{written.name}*"))
    return export.runner(written, format), size


@torch.no_grad()
def compiled(ctx: Context) -> None:
    """nn.Sequential(nn.Linear, index): eager, compiled as it is, and compiled with a graph in the index's place."""
    for engine in ctx.build_paired("ours").values():
        index, x = engine.index, engine.convert(ctx.data.queries)
        index.k = ctx.case.k
        linear = nn.Linear(index.d, index.d, device=index.device)
        linear.load_state_dict({"weight": torch.eye(index.d), "bias": torch.zeros(index.d)})  # the queries as they are
        other = copy.deepcopy(index)  # an index of which a graph was made is compiled as that graph
        parts: dict[str, nn.Module] = {"eager": index, "compiled": index}
        parts |= {f"graph of {layout}, compiled": other.graph(layout=layout) for layout in ("rows", "tiles")}
        models, facts = {name: nn.Sequential(linear, part) for name, part in parts.items()}, {}
        for name in [name for name in models if name != "eager"]:
            ctx.note(f"making {name}")
            torch._dynamo.config.recompile_limit = 64  # of all models here together
            models[name] = torch.compile(models[name], fullgraph=True, dynamic=True)
            # torch compiles one query apart, and any other number once
            made = ctx.attempt(name, timed, list, map(models[name], [x[:nq] for nq in _SMALL[:2]]))
            if made is None:
                del models[name]
            else:
                facts[name] = {"make_seconds": made[0]}
        sizes = {name: _ALL if parts[name] is index else _SMALL for name in models}
        shorter = replace(ctx, effort=replace(ctx.effort, **_EFFORT))
        _time(shorter, models, dict.fromkeys(models, x), sizes, facts)


def _time(
    ctx: Context,
    searches: Mapping[str, Search],
    rows: Mapping[str, Any],
    sizes: Mapping[str, Sequence[int]],
    facts: dict[str, dict[str, Any]],
) -> None:
    """Time each search at its own batch sizes, and those that have `facts` beside the answers of the first one."""
    for nq in sorted({nq for several in sizes.values() for nq in several if nq <= len(ctx.data.queries)}):
        ctx.note(f"nq {nq:,}")
        parts = {name: rotation(rows[name], nq) for name in searches if nq in sizes[name]}
        answers = {name: searches[name](parts[name][0]) for name in parts}
        for name in facts.keys() & parts.keys():
            facts[name]["agreement"] = export.compare(answers[name], next(iter(answers.values()))).ids
        calls = {name: lambda i, n=name, p=part: searches[n](p[i % len(p)]) for name, part in parts.items()}
        ctx.time(calls, nq, facts)
