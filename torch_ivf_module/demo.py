"""The demo: build an index over real vectors, compare it with exact search and with faiss, save it, load it.

N base vectors, Q queries, d dim, L lists, k results.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from . import native
from ._optional import require
from .checkpoint import load
from .commands.common import positive, say, usable_device
from .faiss_bridge import to_faiss
from .index import IndexFlatIP, IndexFlatL2, IndexIVFFlat
from .photographs import photograph_patches
from .plotting import plot_recall
from .tune import Point, recall
from .verification import verify

__all__ = ["add_arguments", "run"]

Swept = tuple[list[list[Point]], dict[int, list[Tensor]]]  # a curve of each library, and by nprobe the ids of each


def timed(call: Callable[[], Any]) -> tuple[Any, float]:
    began = time.perf_counter()
    return call(), time.perf_counter() - began


def progress(items: Iterable[Any], title: str) -> Any:
    return require("tqdm", "demo").tqdm(items, desc=title, leave=False, disable=None)  # None: on a terminal only


def load_data(args: argparse.Namespace) -> tuple[Tensor, Tensor]:
    if args.dim is None:
        source = "8x8x3 patches of two photographs"
        arrays, seconds = timed(lambda: photograph_patches(args.nb, args.nq, args.seed))
        base, queries = map(torch.from_numpy, arrays)
    else:
        source = "synthetic Gaussian vectors (no structure: the hardest case for any IVF index)"
        generator = torch.Generator().manual_seed(args.seed)
        rows, seconds = timed(lambda: torch.randn(args.nb + args.nq, args.dim, generator=generator))
        base, queries = rows.split([args.nb, args.nq])
    say("data", f"{source}: {args.nb:,} base vectors of {base.shape[1]} numbers, {args.nq:,} queries", seconds)
    if args.metric == "cosine":  # the index does this itself; exact search then needs only inner products
        base, queries = torch.nn.functional.normalize(base), torch.nn.functional.normalize(queries)
    return base, queries


def build_index(args: argparse.Namespace, base: Tensor) -> IndexIVFFlat:
    index = IndexIVFFlat(base.shape[1], nlist=args.nlist, metric=args.metric, device=args.device)
    _, seconds = timed(lambda: index.train(base.to(args.device), seed=args.seed, verbose=sys.stderr.isatty()))
    say("train", f"{args.nlist:,} lists, metric {args.metric}", seconds)
    seconds, sizes = timed(lambda: index.add(base.to(args.device)))[1], index.list_sizes()
    spread = f"{int(sizes.min()):,} to {int(sizes.max()):,} a list, median {int(sizes.median()):,}"
    say("add", f"{index.ntotal:,} vectors, {spread}", seconds)
    return index


def exact_answers(args: argparse.Namespace, base: Tensor, queries: Tensor) -> tuple[Tensor, float]:
    """ids (Q, k) of exhaustive search, and its queries/s."""
    flat = (IndexFlatL2 if args.metric == "l2" else IndexFlatIP)(base.shape[1], device=args.device)
    flat.add(base.to(args.device))
    batches = progress(queries.split(256), "exact")
    ids, seconds = timed(lambda: [flat.search(batch.to(args.device), args.topk)[1].cpu() for batch in batches])
    say("exact", f"{type(flat).__name__}, the ground truth for recall", seconds)
    return torch.cat(ids), len(queries) / seconds


def sweep(args: argparse.Namespace, index: IndexIVFFlat, faiss: Any, queries: Tensor, truth: Tensor) -> Swept:
    """Recall and time at every nprobe, of our index and of faiss's with the same lists; the ids of both."""
    on_device, as_numpy = queries.to(args.device), queries.numpy()
    searches: list[Callable[[], Tensor]] = [lambda: index.search(on_device, args.topk)[1].cpu()]
    if faiss is not None:
        theirs = to_faiss(index)
        faiss.omp_set_num_threads(torch.get_num_threads())
        searches.append(lambda: torch.from_numpy(theirs.search(as_numpy, args.topk)[1]))
    curves: list[list[Point]] = [[] for _ in searches]
    answers: dict[int, list[Tensor]] = {}
    for nprobe in progress(args.nprobe, "search"):
        index.nprobe = nprobe
        if faiss is not None:
            faiss.extract_index_ivf(theirs).nprobe = nprobe
        answers[nprobe] = [search() for search in searches]
        for curve, ids, seconds in zip(curves, answers[nprobe], interleaved_medians(searches), strict=True):
            curve.append(Point(nprobe, None, recall(ids, truth), seconds / len(queries)))
    return curves, answers


def interleaved_medians(searches: Sequence[Callable[[], Tensor]]) -> list[float]:
    """Median seconds of each, timed in turns A B A B; short searches are repeated more often, for a second in all."""
    spent: list[list[float]] = [[] for _ in searches]
    while len(spent[0]) < 3 or (len(spent[0]) < 15 and sum(map(sum, spent)) < 1):
        for search, seconds in zip(searches, spent, strict=True):
            time.sleep(0.02)  # the other library's threads keep spinning for a moment after its last call
            seconds.append(timed(search)[1])
    return list(map(statistics.median, spent))


def print_table(curves: list[list[Point]], k: int, exact_qps: float) -> None:
    titles = ["nprobe", f"recall@{k}", "queries/s", f"faiss recall@{k}", "faiss queries/s", "times faiss"]
    lines = [titles := titles[: 3 * len(curves)]]
    for points in zip(*curves, strict=True):
        cells = [cell for point in points for cell in (f"{point.recall:.4f}", f"{1 / point.seconds:,.0f}")]
        lines.append([f"{points[0].nprobe}", *cells, f"{points[-1].seconds / points[0].seconds:.2f}"])
    lines.append(["exact", f"{1:.4f}", f"{exact_qps:,.0f}"])
    rows = ["  ".join(cell.rjust(len(title)) for cell, title in zip(line, titles, strict=False)) for line in lines]
    print("", *rows, "", sep="\n")


def plot(curves: list[list[Point]], k: int, path: Path) -> None:
    # Figure without pyplot: it needs no display and leaves no global state.
    figure = require("matplotlib.figure", "plot").Figure(figsize=(7, 4.5), layout="constrained")
    axes = plot_recall(curves[0], figure.subplots())
    axes.lines[0].set_label("torch_ivf_module")
    for curve in curves[1:]:
        at = zip(*((point.recall, 1 / point.seconds) for point in curve), strict=True)
        axes.plot(*at, "s--", color="#D55E00", ms=5, label="faiss")
    axes.set(xlabel=f"recall@{k}", title="Speed against recall, by nprobe")
    axes.legend(frameon=False)
    figure.savefig(path, dpi=150)
    say("plot", f"{path}")


def survives_saving(index: IndexIVFFlat, queries: Tensor, k: int, path: Path) -> bool:
    _, seconds = timed(lambda: index.save(path))
    say("save", f"{path.name}, {path.stat().st_size / 2**20:,.1f} MiB", seconds)
    again, seconds = timed(lambda: load(path).to(index.device))
    say("load", f"{type(again).__name__} of {again.ntotal:,} vectors", seconds)
    same = torch.equal(*(one.search(queries.to(index.device), k)[1] for one in (again, index)))
    print(f"same answers: {'yes' if same else 'no'}", flush=True)
    return same


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the demo's flags."""
    option, nprobes = parser.add_argument, "lists to probe per query, one or more values (default: 1 4 8 16 32)"
    option("--device", type=usable_device, default="cpu", help="device of our index (default: cpu)")
    option("--dim", type=positive, help="use Gaussian vectors of this dimension instead of image patches")
    option("--nb", type=positive, default=262_144, help="number of vectors (default: %(default)s)")
    option("--nq", type=positive, default=2_048, help="number of queries (default: %(default)s)")
    option("--nlist", type=positive, default=512, help="number of lists (default: %(default)s)")
    option("--nprobe", type=positive, nargs="+", default=[1, 4, 8, 16, 32], metavar="P", help=nprobes)
    option("--topk", type=positive, default=20, help="results per query (default: %(default)s)")
    option("--metric", choices=["l2", "ip", "cosine"], default="l2", help="metric (default: %(default)s)")
    option("--seed", type=int, default=0, help="seed of the data and of training (default: %(default)s)")
    option("--verify", action="store_true", help="fail if ids differ from those of faiss or brute force, ties aside")
    option("--plot", type=Path, metavar="FILE.png", help="plot queries/s against recall")
    option("--save", type=Path, metavar="FILE", help="save the index here (default: a temporary folder)")


def announce(device: torch.device) -> Any:
    """Print what the demo runs with; faiss, or None where it is not installed."""
    cpuinfo = Path("/proc/cpuinfo").read_text(encoding="utf-8") if Path("/proc/cpuinfo").exists() else ""
    processor = cpuinfo.partition("model name")[2].partition("\n")[0].strip("\t :") or platform.machine()
    try:
        faiss = require("faiss", "faiss")
        version = f"faiss {faiss.__version__}"
    except ImportError:
        faiss, version = None, "no faiss: its columns are skipped (extra: faiss)"
    versions = f"torch {torch.__version__}, Python {platform.python_version()}, {version}"
    print(f"torch_ivf_module on {processor} ({device}), {torch.get_num_threads()} threads, {versions}", flush=True)
    return faiss


@torch.no_grad()
def run(args: argparse.Namespace) -> int:
    """Run the demo; 0 when everything that was checked held, else 1."""
    faiss = announce(args.device)
    if args.device.type == "cpu" and native.enabled():  # before anything is timed
        if not native.available():
            print("compiling the native kernel, once, in about a minute", flush=True)
        try:
            say("kernel", "native", timed(native.build)[1])
        except RuntimeError as error:
            say("kernel", f"none, PyTorch operations only: {error}")
    args.nprobe = sorted({min(nprobe, args.nlist) for nprobe in args.nprobe})
    base, queries = load_data(args)
    index = build_index(args, base)
    truth, exact_qps = exact_answers(args, base, queries)
    curves, answers = sweep(args, index, faiss, queries, truth)
    print_table(curves, args.topk, exact_qps)
    correct = not args.verify or verify(index, base, queries, answers)
    if args.plot:
        plot(curves, args.topk, args.plot)
    with tempfile.TemporaryDirectory() as folder:
        same = survives_saving(index, queries, args.topk, args.save or Path(folder) / "index.pt")
    return 0 if correct and same else 1
