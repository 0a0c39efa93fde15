"""``export``: a saved index becomes a model file that searches without this package."""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from .. import export
from .._files import check_target
from ..functional.row_codes import as_float, rows_at
from ..graph import LAYOUTS, SearchGraph
from ..index import IndexPreTransform, SearchParams
from .common import Reporter, add_json, load_trained, positive, shown_bytes

__all__ = ["add_arguments", "run"]

SUFFIXES = {"torchscript": ".ts.pt", "exported": ".pt2", "aoti": ".aoti.pt2", "onnx": ".onnx"}
BATCHES = (1, 2, 33)  # of the check: the batch is dynamic


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the flags of `export`."""
    option = parser.add_argument
    option("index", type=Path, help="a saved index")
    option("--format", choices=tuple(export.FORMATS), required=True)
    option("-k", "--k", type=positive, help="results per query (default: the index's own)")
    option("--nprobe", type=positive, help="lists to probe per query (default: the index's own)")
    option("--max-codes", type=positive, help="maximum of rows that a query reads (default: the index's own)")
    option("--storage", choices=("float32", "float16", "bfloat16"), help="dtype of the vectors (default: unchanged)")
    option("--layout", choices=LAYOUTS, default="rows", help="tiles is faster for aoti, rows otherwise (default: rows)")
    option("--out", type=Path, help="the file to write (default: next to the index)")
    option("--check", action="store_true", help="run the file, and compare its results with the index")
    add_json(parser)


def run(args: argparse.Namespace) -> int:
    """Export, check where asked to, and say what was written; 1 if an answer differs."""
    talk = Reporter(args)
    out = args.out or args.index.with_suffix(SUFFIXES[args.format])
    check_target(out, args.index)
    index = load_trained(args.index)
    if isinstance(index, IndexPreTransform):
        raise ValueError(f"{args.index} is an IndexPreTransform: export index.graph() in Python instead")
    graph = index.graph(
        args.k,
        args.nprobe,
        max_codes=args.max_codes,
        storage=getattr(torch, args.storage) if args.storage else None,
        layout=args.layout,
    )
    start = time.perf_counter()
    export.FORMATS[args.format](graph, out)
    seconds = time.perf_counter() - start
    beside = (file for file in out.parent.iterdir() if file.suffix == ".data")
    files = [out, *(file for file in beside if file.name.startswith(f"{out.name}."))]
    size = sum(file.stat().st_size for file in files)
    kind = "flat" if index.store.flat else f"nprobe {graph.nprobe}"
    talk.say("wrote", f"{', '.join(map(str, files))}: {shown_bytes(size)}", seconds)
    talk.say("holds", f"{index.ntotal:,} vectors of {index.d}, {index.metric}, k {graph.k}, {kind}")
    facts: dict[str, Any] = {"files": list(map(str, files)), "format": args.format, "bytes": size, "seconds": seconds}
    if args.check:
        rounded = args.storage not in (None, str(index.dtype).removeprefix("torch.")) and args.layout == "rows"
        params = SearchParams(nprobe=graph.nprobe, max_codes=graph.max_codes)
        # A file that holds rounded vectors is to answer as the graph it was made of, any other as the index itself.
        expect = graph if rounded else lambda x: index.search(x, graph.k, params=params)
        facts["check"] = _check(talk, graph, expect, out, args.format)
    talk.result(facts)
    return 0 if all(found["ok"] for found in facts.get("check", [])) else 1


def _check(
    talk: Reporter, graph: SearchGraph, expect: Callable[..., Any], path: Path, format: str
) -> list[dict[str, Any]]:
    """Run the file on stored vectors with noise, and compare."""
    run = export.runner(path, format)
    generator = torch.Generator(device="cpu").manual_seed(0)
    stored = graph.lists().packed
    checks = []
    for batch in BATCHES:
        if stored.shape[0]:
            chosen = torch.randint(stored.shape[0], (batch,), generator=generator, device="cpu")
            rows = as_float(rows_at(stored, chosen), graph.d)
        else:
            rows = torch.zeros(batch, graph.d, dtype=torch.float32, device="cpu")
        noise = torch.randn(batch, graph.d, generator=generator, dtype=torch.float32, device="cpu")
        queries = rows + 0.1 * noise
        agreement = export.compare(run(queries), expect(queries))
        checks.append({"batch": batch, **agreement._asdict(), "ok": agreement.good})
        talk.say(
            "check",
            f"batch {batch}: {agreement.ids:.2%} of the ids agree, "
            f"distances to {agreement.distances:.1e}: {'ok' if agreement.good else 'DIFFERENT'}",
        )
    return checks
