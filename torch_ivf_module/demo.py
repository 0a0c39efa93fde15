"""The demo: build an index over real vectors, compare it with exact search and with faiss, save it, load it.

    python -m torch_ivf_module demo
    python -m torch_ivf_module demo --dim 128 --nlist 512 --nprobe 8 32 --verify

Shapes: N base vectors, Q queries, d numbers a vector, L lists, k results.
"""

from __future__ import annotations

import argparse
import math
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from . import native
from ._optional import require
from .checkpoint import load
from .commands.common import positive, say, usable_device
from .index import IndexFlatIP, IndexFlatL2, IndexIVFFlat

__all__ = ["add_arguments", "main", "photograph_patches", "run"]

PATCH = 8
Answers = tuple[Tensor, Tensor]  # D (Q, k), I (Q, k), both on the CPU
Search = Callable[[], Answers]


# --- data ---------------------------------------------------------------------------------------------------


def photograph_patches(
    nb: int = 262_144, nq: int = 19_600, seed: int = 0
) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]:
    """Real vectors without a download: patches of the two photographs that scikit-learn ships.

    Every 8x8x3 patch (stride 1) of both photographs, 531,720 in all, is numbered row by row; a seeded
    permutation of the numbers picks the base vectors and, after them, the queries.

    Args:
        nb: how many base vectors.
        nq: how many queries; no query is also a base vector (though two patches may look the same).
        seed: of ``numpy.random.default_rng``.

    Returns:
        base (nb, 192) and queries (nq, 192), float32 in 0..1.

    Raises:
        ValueError: the photographs hold fewer than nb + nq patches.
        ImportError: scikit-learn or Pillow is missing.

    Example:
        >>> base, queries = photograph_patches(nb=100, nq=5)
        >>> base.shape, queries.shape
        ((100, 192), (5, 192))
    """
    require("PIL", "demo")  # scikit-learn reads the photographs with it
    images = require("sklearn.datasets", "demo").load_sample_images().images
    shape = (PATCH, PATCH, 3)
    # Views, (rows, columns, 8, 8, 3) per photograph: only the picked patches are ever copied.
    windows = [np.lib.stride_tricks.sliding_window_view(image, shape)[:, :, 0] for image in images]
    counts = [view.shape[0] * view.shape[1] for view in windows]
    if nb < 0 or nq < 0 or nb + nq > sum(counts):
        raise ValueError(f"nb + nq must be within 0..{sum(counts):,} patches, got {nb:,} + {nq:,}")
    picked = np.random.default_rng(seed).permutation(sum(counts))[: nb + nq]

    vectors = np.empty((nb + nq, math.prod(shape)), dtype=np.float32)
    first = 0
    for view, count in zip(windows, counts, strict=True):
        mine = np.flatnonzero((picked >= first) & (picked < first + count))
        row, column = np.divmod(picked[mine] - first, view.shape[1])
        vectors[mine] = view[row, column].reshape(len(mine), -1)
        first += count
    vectors /= np.float32(255)
    return vectors[:nb], vectors[nb:]


def gaussian(nb: int, nq: int, dim: int, seed: int) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]:
    rng = np.random.default_rng(seed)
    return (
        rng.standard_normal((nb, dim), dtype=np.float32),
        rng.standard_normal((nq, dim), dtype=np.float32),
    )


def load_data(args: argparse.Namespace) -> tuple[Tensor, Tensor]:
    began = time.perf_counter()
    if args.dim is None:
        source = "8x8x3 patches of two photographs"
        base, queries = photograph_patches(args.nb, args.nq, args.seed)
    else:
        source = "synthetic Gaussian vectors (no structure: the hardest case for any IVF index)"
        base, queries = gaussian(args.nb, args.nq, args.dim, args.seed)
    seconds = time.perf_counter() - began
    say("data", f"{source}: {len(base):,} base vectors of {base.shape[1]} numbers, {len(queries):,} queries", seconds)
    x, q = torch.from_numpy(base), torch.from_numpy(queries)
    if args.metric == "cosine":
        # The index does this itself; done here too, exact search and faiss need only inner products.
        x, q = torch.nn.functional.normalize(x), torch.nn.functional.normalize(q)
    return x, q


# --- the contestants ----------------------------------------------------------------------------------------


def build_index(args: argparse.Namespace, base: Tensor) -> IndexIVFFlat:
    index = IndexIVFFlat(base.shape[1], nlist=args.nlist, metric=args.metric, device=args.device)
    began = time.perf_counter()
    index.train(base.to(args.device), seed=args.seed, verbose=True)
    say("train", f"{args.nlist:,} lists, metric {args.metric}", time.perf_counter() - began)

    began = time.perf_counter()
    with progress(base.split(32_768), "add") as batches:
        for batch in batches:
            index.add(batch.to(args.device))
    lengths = index.list_offsets.diff()
    spread = f"{int(lengths.min()):,} to {int(lengths.max()):,} a list, median {int(lengths.median()):,}"
    say("add", f"{index.ntotal:,} vectors, {spread}", time.perf_counter() - began)
    return index


def exact_answers(args: argparse.Namespace, base: Tensor, queries: Tensor) -> tuple[Tensor, float]:
    """ids (Q, k) of exhaustive search, and its queries/s."""
    kind = IndexFlatL2 if args.metric == "l2" else IndexFlatIP
    flat = kind(base.shape[1], device=args.device)
    flat.add(base.to(args.device))
    began = time.perf_counter()
    with progress(queries.split(256), "exact") as batches:
        ids = torch.cat([flat.search(batch.to(args.device), args.topk)[1].cpu() for batch in batches])
    seconds = time.perf_counter() - began
    say("exact", f"{kind.__name__}, the ground truth for recall", seconds)
    return ids, len(queries) / seconds


def optional_faiss() -> ModuleType | None:
    try:
        return require("faiss", "faiss")
    except ImportError:
        return None


def faiss_twin(faiss: ModuleType, index: IndexIVFFlat) -> Any:
    """faiss's IndexIVFFlat with our centroids and, row for row, our lists: only the search can differ."""
    d, nlist = index.d, index.nlist
    metric = faiss.METRIC_L2 if index.metric == "l2" else faiss.METRIC_INNER_PRODUCT
    quantizer = faiss.IndexFlatL2(d) if index.metric == "l2" else faiss.IndexFlatIP(d)
    quantizer.add(index.centroids.cpu().numpy())
    twin = faiss.IndexIVFFlat(quantizer, d, nlist, metric)
    twin.is_trained = True

    vectors = index.packed_embeddings.float().cpu().contiguous().numpy()
    ids = index.list_ids.cpu().numpy()
    lists = torch.arange(nlist, device="cpu").repeat_interleave(index.list_offsets.cpu().diff()).numpy()
    pointer = faiss.swig_ptr
    twin.add_core(len(ids), pointer(vectors), pointer(ids), pointer(lists))
    return twin


# --- the comparison -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Row:
    """One line of the table; the faiss columns are None where faiss is not installed."""

    nprobe: int
    recall: float
    qps: float
    faiss_recall: float | None = None
    faiss_qps: float | None = None


def recall(ids: Tensor, truth: Tensor) -> float:
    """The share of the true neighbours (Q, k) that were found."""
    return (ids[:, :, None] == truth[:, None, :]).any(1).float().mean().item()


def timed(search: Search) -> float:
    time.sleep(0.02)  # the other library's threads go on spinning for a moment after its last call
    began = time.perf_counter()
    search()
    return time.perf_counter() - began


def interleaved_medians(searches: Sequence[Search]) -> list[float]:
    """Median seconds of each: A B A B ..., so that a noisy neighbour disturbs them alike.

    They have run once before. Short searches are repeated more often, for about a second in all.
    """
    rounds = [[timed(search) for search in searches]]
    for _ in range(min(14, max(2, int(1.0 / sum(rounds[0]))))):
        rounds.append([timed(search) for search in searches])
    return [statistics.median(column) for column in zip(*rounds, strict=True)]


def sweep(
    args: argparse.Namespace, index: IndexIVFFlat, twin: Any, queries: Tensor, truth: Tensor
) -> tuple[list[Row], dict[int, list[Answers]]]:
    """The table, and the answers (ours, then faiss's) at every nprobe."""
    on_device, as_numpy, k = queries.to(args.device), queries.numpy(), args.topk

    def ours() -> Answers:
        scores, ids = index.search(on_device, k)
        return scores.cpu(), ids.cpu()  # an accelerator has answered when the answers are here

    def theirs() -> Answers:
        scores, ids = twin.search(as_numpy, k)
        return torch.from_numpy(scores), torch.from_numpy(ids)

    contestants = [ours] if twin is None else [ours, theirs]
    rows, answers = [], {}
    with progress(args.nprobe, "search") as nprobes:
        for nprobe in nprobes:
            index.nprobe = nprobe
            if twin is not None:
                twin.nprobe = nprobe
            found = [search() for search in contestants]
            figures: list[float] = []
            for (_, ids), seconds in zip(found, interleaved_medians(contestants), strict=True):
                figures += [recall(ids, truth), len(queries) / seconds]
            rows.append(Row(nprobe, *figures))
            answers[nprobe] = found
    return rows, answers


def print_table(rows: Sequence[Row], k: int, exact_qps: float) -> None:
    compared = rows[0].faiss_qps is not None
    titles = ["nprobe", f"recall@{k}", "queries/s"]
    if compared:
        titles += [f"faiss recall@{k}", "faiss queries/s", "times faiss"]
    lines = [titles]
    for row in rows:
        cells = [f"{row.nprobe}", f"{row.recall:.4f}", f"{row.qps:,.0f}"]
        if row.faiss_qps is not None and row.faiss_recall is not None:
            cells += [f"{row.faiss_recall:.4f}", f"{row.faiss_qps:,.0f}", f"{row.qps / row.faiss_qps:.2f}"]
        lines.append(cells)
    lines.append(["exact", f"{1:.4f}", f"{exact_qps:,.0f}"])
    print()
    for line in lines:
        print("  ".join(cell.rjust(len(title)) for cell, title in zip(line, titles, strict=False)))
    print()


def plot(rows: Sequence[Row], k: int, path: Path) -> None:
    # Figure alone, without pyplot: it needs no display and leaves no global state.
    figure = require("matplotlib.figure", "plot").Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    axes.plot([r.recall for r in rows], [r.qps for r in rows], "o-", label="torch_ivf_module")
    for row in rows:
        axes.annotate(f"{row.nprobe}", (row.recall, row.qps), textcoords="offset points", xytext=(5, 5))
    if rows[0].faiss_qps is not None:
        axes.plot([r.faiss_recall for r in rows], [r.faiss_qps for r in rows], "s--", label="faiss")
    axes.set(xlabel=f"recall@{k}", ylabel="queries/s", yscale="log", title="Speed against recall, by nprobe")
    axes.grid(True, which="both", alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=150)
    say("plot", f"{path}")


# --- checking -----------------------------------------------------------------------------------------------


def true_scores(base: Tensor, queries: Tensor, ids: Tensor, metric: str) -> Tensor:
    """(Q, k) float64, straight from the vectors that the ids name; +inf where the id is -1."""
    parts = []
    for q, rows in zip(queries.split(512), ids.split(512), strict=True):
        vectors, q = base[rows.clamp(min=0)].double(), q.double()[:, None]  # (q, k, d), (q, 1, d)
        scores = (vectors - q).square().sum(-1) if metric == "l2" else (vectors * q).sum(-1)
        parts.append(scores.masked_fill(rows < 0, math.inf))
    return torch.cat(parts)


def centroid_order(index: IndexIVFFlat, queries: Tensor) -> Answers:
    """Every list for every query, best first, in float64: scores where lower is better (Q, L), lists (Q, L)."""
    centroids, q = index.centroids.cpu().double(), queries.double()
    scores = -(q @ centroids.T)
    if index.metric == "l2":
        scores = 2 * scores + centroids.square().sum(-1) + q.square().sum(-1, keepdim=True)
    return scores.sort(-1)


def brute_force(index: IndexIVFFlat, queries: Tensor, lists: Tensor, k: int) -> Tensor:
    """ids (Q, k) by the plainest means: every vector of every probed list (Q, P), in float64."""
    offsets, packed = index.list_offsets.cpu().tolist(), index.packed_embeddings.cpu()
    ids = torch.full((len(queries), k), -1, device="cpu")
    for n, (query, probed) in enumerate(zip(queries.double(), lists.tolist(), strict=True)):
        rows = torch.cat([torch.arange(offsets[m], offsets[m + 1], device="cpu") for m in probed])
        vectors = packed[rows].double()
        scores = (vectors - query).square().sum(-1) if index.metric == "l2" else -(vectors @ query)
        best = scores.topk(min(k, len(rows)), largest=False).indices
        ids[n, : len(best)] = index.list_ids.cpu()[rows[best]]
    return ids


def same_answers(base: Tensor, queries: Tensor, metric: str, mine: Tensor, reference: Tensor) -> Tensor:
    """(Q,) bool: the same ids, or others whose true scores are within 1e-4 of the reference's.

    Only the ids are believed: both sides' scores are computed afresh from the vectors they name. So
    a right distance beside a wrong id is caught. Returning one id twice does not count as a tie.
    """
    ours = true_scores(base, queries, mine, metric).sort(-1).values
    theirs = true_scores(base, queries, reference, metric).sort(-1).values
    # float32 cannot tell distances apart much below the rounding of the vectors' own size.
    slack = 1e-4 * theirs.abs() + 1e-6 * queries.double().square().sum(-1, keepdim=True)
    close = (ours == theirs) | ((ours - theirs).abs() <= slack)  # the first: inf equals inf
    ordered = mine.sort(-1).values
    twice = (ordered[:, 1:] == ordered[:, :-1]) & (ordered[:, 1:] >= 0)
    return close.all(-1) & ~twice.any(-1)


def tied_last_list(order: Tensor, queries: Tensor, nprobe: int) -> Tensor:
    """(Q,) bool: the last list read and the first one left out are so equally far that rounding chooses.

    faiss ranks the lists by q·q + c·c - 2 q·c in float32, so its error grows with q·q, not with the distance.
    """
    if nprobe == order.shape[1]:
        return torch.zeros(len(order), dtype=torch.bool, device=order.device)
    last, following = order[:, nprobe - 1], order[:, nprobe]
    return following - last <= 1e-5 * last.abs() + 1e-6 * queries.double().square().sum(-1)


def verify(index: IndexIVFFlat, base: Tensor, queries: Tensor, answers: dict[int, list[Answers]]) -> bool:
    """Says, for every nprobe, whether our ids are faiss's, or those of brute force where there is no faiss."""
    compared = all(len(found) == 2 for found in answers.values())
    name = "faiss" if compared else "brute force over the probed lists"
    checked = queries if compared else queries[:128]
    order, lists = centroid_order(index, checked)
    good = True
    for nprobe, found in answers.items():
        mine = found[0][1][: len(checked)]
        k = mine.shape[1]
        reference = found[1][1] if compared else brute_force(index, checked, lists[:, :nprobe], k)
        same = same_answers(base, checked, index.metric, mine, reference)
        tied = tied_last_list(order, checked, nprobe)
        wrong = int((~same & ~tied).sum())
        text = f"nprobe {nprobe}: {len(checked) - int((~same).sum()):,} of {len(checked):,} queries as {name}"
        if spared := int((~same & tied).sum()):
            text += f", {spared} differ in a tied last list"
        say("verify", text + (f", {wrong} WRONG" if wrong else ""))
        good = good and wrong == 0
    return good


def survives_saving(index: IndexIVFFlat, queries: Tensor, k: int, path: Path) -> bool:
    began = time.perf_counter()
    index.save(path)
    say("save", f"{path.name}, {path.stat().st_size / 2**20:,.1f} MiB", time.perf_counter() - began)
    began = time.perf_counter()
    again = load(path).to(index.centroids.device)
    say("load", f"{type(again).__name__} of {again.ntotal:,} vectors", time.perf_counter() - began)
    on_device = queries.to(index.centroids.device)
    same = torch.equal(again.search(on_device, k)[1], index.search(on_device, k)[1])
    print(f"same answers: {'yes' if same else 'no'}", flush=True)
    return same


# --- the command --------------------------------------------------------------------------------------------


def progress(items: Iterable[Any], title: str) -> Any:
    return require("tqdm", "demo").tqdm(items, desc=title, leave=False)


def processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def announce(device: torch.device, faiss: ModuleType | None) -> None:
    found = f"faiss {faiss.__version__}" if faiss else "no faiss: its columns are skipped (extra: faiss)"
    print(
        f"torch_ivf_module on {processor()} ({device}), {torch.get_num_threads()} threads, "
        f"torch {torch.__version__}, Python {platform.python_version()}, {found}",
        flush=True,
    )


def have_kernel(device: torch.device) -> None:
    """Have the kernel for this CPU built before anything is timed, and say so if there is none."""
    if device.type != "cpu" or not native.enabled():
        return
    if not native.available():
        print("building the native kernel, once, in about half a minute", flush=True)
    try:
        began = time.perf_counter()
        native.build()
        say("kernel", "native", time.perf_counter() - began)
    except RuntimeError as error:
        say("kernel", f"none, PyTorch operations only: {error}")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the demo's flags."""
    option = parser.add_argument
    option("--device", type=usable_device, default="cpu", help="where our index lives (default: cpu)")
    option("--dim", type=positive, help="Gaussian vectors of this dimension instead of photograph patches")
    option("--nb", type=positive, default=262_144, help="base vectors (default: %(default)s)")
    option("--nq", type=positive, default=2_048, help="queries (default: %(default)s)")
    option("--nlist", type=positive, default=512, help="lists to train (default: %(default)s)")
    option(
        "--nprobe", type=positive, nargs="+", default=[1, 4, 8, 16, 32], metavar="P",
        help="lists to read for a query, one or more settings (default: 1 4 8 16 32)",
    )  # fmt: skip
    option("--topk", type=positive, default=20, help="results for a query (default: %(default)s)")
    option("--metric", choices=["l2", "ip", "cosine"], default="l2", help="default: %(default)s")
    option("--seed", type=int, default=0, help="of the data and of training (default: %(default)s)")
    option(
        "--verify", action="store_true",
        help="fail unless our ids are faiss's (brute force's where there is no faiss), ties aside",
    )  # fmt: skip
    option("--plot", type=Path, metavar="FILE.png", help="draw queries/s against recall")
    option("--save", type=Path, metavar="FILE", help="keep the index here (default: a temporary folder)")


@torch.no_grad()
def run(args: argparse.Namespace) -> int:
    """Run the demo; 0 when everything that was checked held, else 1."""
    faiss = optional_faiss()
    announce(args.device, faiss)
    have_kernel(args.device)
    args.nprobe = sorted({min(nprobe, args.nlist) for nprobe in args.nprobe})
    base, queries = load_data(args)
    index = build_index(args, base)
    truth, exact_qps = exact_answers(args, base, queries)
    twin = None
    if faiss is not None:
        faiss.omp_set_num_threads(torch.get_num_threads())
        twin = faiss_twin(faiss, index)
    rows, answers = sweep(args, index, twin, queries, truth)
    print_table(rows, args.topk, exact_qps)

    good = not args.verify or verify(index, base, queries, answers)
    if args.plot:
        plot(rows, args.topk, args.plot)
    with tempfile.TemporaryDirectory() as folder:
        good = survives_saving(index, queries, args.topk, args.save or Path(folder) / "index.pt") and good
    return 0 if good else 1


def main(argv: Sequence[str] | None = None) -> int:
    """The demo as a program of its own: ``main(["--nb", "10000"])``; returns the exit status."""
    parser = argparse.ArgumentParser(prog="ivf_demo", description=(__doc__ or "").partition("\n")[0])
    add_arguments(parser)
    args = parser.parse_args(argv)
    try:
        return run(args)
    except (ImportError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
