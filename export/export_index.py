"""Export a saved index as a model file that searches without this package.

python export/export_index.py INDEX --format onnx --k 10 --nprobe 16 --check

INDEX is what `index.save(path)` wrote. The file goes beside it unless --out says where; --check runs it on random
queries and compares its answers with the index's own.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

from torch_ivf_module import IndexFlat, SearchGraph, SearchParams, export, load
from torch_ivf_module.graph import LAYOUTS

SUFFIXES = {"torchscript": ".ts.pt", "exported": ".pt2", "aoti": ".aoti.pt2", "onnx": ".onnx"}
BATCHES = (1, 2, 33)  # of the check: the batch is dynamic


def main(argv: list[str] | None = None) -> int:
    options = parser().parse_args(argv)
    index = load(options.index)
    graph = index.graph(
        options.k,
        options.nprobe,
        max_codes=options.max_codes,
        storage=getattr(torch, options.storage) if options.storage else None,
        layout=options.layout,
    )
    out = options.out or options.index.with_suffix(SUFFIXES[options.format])
    if out.resolve() == options.index.resolve():
        raise SystemExit(f"--out would overwrite {options.index}; name another file")
    start = time.perf_counter()
    export.FORMATS[options.format](graph, out)
    beside = (file for file in out.parent.iterdir() if file.suffix == ".data")
    files = [out, *(file for file in beside if file.name.startswith(f"{out.name}."))]
    size = sum(file.stat().st_size for file in files) / 2**20
    kind = "flat" if isinstance(index, IndexFlat) else f"nprobe {graph.nprobe}"
    print(
        f"wrote {', '.join(str(file) for file in files)}: {size:.1f} MiB in {time.perf_counter() - start:.1f} s; "
        f"{index.ntotal:,} vectors of {index.d}, {index.metric}, k {graph.k}, {kind}"
    )
    if not options.check:
        return 0
    rounded = options.storage not in (None, str(index.dtype).removeprefix("torch.")) and options.layout == "rows"
    params = SearchParams(nprobe=graph.nprobe, max_codes=graph.max_codes)
    # A file that holds rounded vectors is to answer as the graph it was made of, any other as the index itself.
    expect = graph if rounded else lambda x: index.search(x, graph.k, params=params)
    return check(graph, expect, out, options.format)


def check(graph: SearchGraph, expect: Callable[..., tuple], path: Path, format: str) -> int:
    """Run the file on stored vectors with noise and compare; 1 if any answer differs."""
    run = export.runner(path, format)
    generator = torch.Generator().manual_seed(0)
    stored = graph.lists().packed.float()
    failed = False
    for batch in BATCHES:
        if stored.shape[0]:
            rows = stored[torch.randint(stored.shape[0], (batch,), generator=generator)]
        else:
            rows = torch.zeros(batch, graph.d)
        queries = rows + 0.1 * torch.randn(batch, graph.d, generator=generator)
        agreement = export.compare(run(queries), expect(queries))
        failed = failed or not agreement.good
        print(
            f"check, batch {batch}: {agreement.ids:.2%} of the ids agree, "
            f"distances to {agreement.distances:.1e}: {'ok' if agreement.good else 'DIFFERENT'}"
        )
    return int(failed)


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(
        prog="export_index.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    made.add_argument("index", type=Path, help="a saved index")
    made.add_argument("--format", choices=tuple(export.FORMATS), required=True)
    made.add_argument("--k", type=int, help="results a query (default: the index's own)")
    made.add_argument("--nprobe", type=int, help="lists a query visits (default: the index's own)")
    made.add_argument("--max-codes", type=int, help="the most rows a query reads (default: the index's own)")
    made.add_argument("--storage", choices=("float32", "float16", "bfloat16"), help="dtype of the scanned vectors")
    made.add_argument("--layout", choices=LAYOUTS, default="rows", help="see IndexBase.graph")
    made.add_argument("--out", type=Path, help="where to write (default: beside the index)")
    made.add_argument("--check", action="store_true", help="run the file and compare its answers")
    return made


if __name__ == "__main__":
    sys.exit(main())
