"""Late interaction: `MaxSim` beside a loop over documents, and beside one matrix product, on a synthetic corpus.

Every document is about 12 of 2,000 topics; its tokens are noisy unit vectors of them. A query is some tokens of one
document with new noise. Searches of one query and of 16; a time is the best of several, of one query.

Q queries, T tokens per query, M documents, W tokens per document, d dim.
"""

import argparse
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize

from torch_ivf_module import IndexIVFFlat, MaxSim, SearchParams, native

from .. import machine, results
from ..tables import MAXSIM, pivot

K, TOPICS, PER_DOCUMENT, NOISE, QUERIES = 10, 2000, 12, 0.6, 16
SHAPE = {  # what can be set; figures of other values than these are stored, but not reported
    "documents": (10_000, "documents"),
    "document_tokens": (64, "vectors of a document"),
    "query_tokens": (32, "vectors of a query, at most those of a document"),
    "d": (128, "dimension"),
    "nlist": (1_024, "lists"),
}
JOB = {"case": "documents", "task": "maxsim"}
SETTINGS = ((1, 32, 64), (2, 128, 128), (8, 512, 128), (8, 512, 512))  # nprobe, neighbours, candidates


def add_arguments(parser: argparse.ArgumentParser) -> None:
    option = parser.add_argument
    for name, (default, help) in SHAPE.items():
        option(f"--{name.replace('_', '-')}", type=int, default=default, help=f"{help} (default: {default:,})")
    option("--out", type=Path, default=results.DEFAULT, help="the file to append to")
    machine.add_arguments(parser)


def run(options: argparse.Namespace) -> int:
    machine.set_threads(options.threads)
    facts = machine.describe(options.threads, f"multi-vector --threads {options.threads}")
    shape = {name: getattr(options, name) for name in SHAPE}
    other = {name: value for name, value in shape.items() if value != SHAPE[name][0]}
    facts |= {"native": native.available(), "skipped": {}, "values": other, **shape}
    run, begin = results.name(facts), time.perf_counter()
    rows = [{"kind": "row", **JOB, **row, "run": run} for row in measure(options)]
    done = {"kind": "done", **JOB, "seconds": time.perf_counter() - begin, "run": run}
    for line in ({"kind": "run", "schema": 1, "run": run, **facts}, *rows, done):
        results.append(options.out, line)
    print(pivot(MAXSIM, rows))
    return 0


def measure(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """The rows: seconds of one query and, of a query, in a batch of 16, and the share of the right documents."""
    vectors, queries = corpus(options)  # (M, W, d), (Q, T, d)
    flat = vectors.flatten(0, 1)
    index = IndexIVFFlat(options.d, nlist=options.nlist, metric="ip")
    index.train(flat[torch.randperm(flat.shape[0], generator=torch.Generator().manual_seed(1))[: 60 * options.nlist]])
    index.add_with_ids(flat, torch.arange(options.documents).repeat_interleave(options.document_tokens))
    documents = list(vectors)

    def loop(query: Tensor) -> Tensor:
        scores = [(query @ document.T).max(1).values.sum() for document in documents]
        return torch.stack(scores).topk(K).indices

    def product(query: Tensor) -> Tensor:
        return (flat @ query.T).unflatten(0, vectors.shape[:2]).amax(1).sum(1).topk(K).indices

    truth = torch.stack([loop(query) for query in queries])
    base = _fastest(lambda i: loop(queries[i]), 3)
    yield {"engine": "loop over documents", "seconds": base, "loop": base, "recall": 1.0}
    found = torch.stack([product(query) for query in queries])
    one = _fastest(lambda i: product(queries[i]), 3)
    yield {"engine": "one matrix product", "seconds": one, "loop": base, "recall": _recall(found, truth)}
    for nprobe, neighbours, candidates in ((options.nlist, 1, 1), *SETTINGS):
        searcher, params = MaxSim(index, neighbours=neighbours, candidates=candidates), SearchParams(nprobe=nprobe)
        search = partial(searcher.search, k=K, params=params)
        found = search(queries)[1]
        one = _fastest(lambda i, search=search: search(queries[i : i + 1]), 8)
        many = _fastest(lambda _, search=search: search(queries), 3) / QUERIES
        name = f"nprobe {nprobe}, neighbours {neighbours}, candidates {candidates}"
        name = "all lists" if nprobe == options.nlist else name
        yield {"engine": name, "seconds": one, "batch_seconds": many, "loop": base, "recall": _recall(found, truth)}


def corpus(options: argparse.Namespace) -> tuple[Tensor, Tensor]:
    """Unit vectors (M, W, d) of documents, and queries (Q, T, d)."""
    generator, d = torch.Generator().manual_seed(0), options.d
    shape = options.documents, options.document_tokens

    def noisy(x: Tensor) -> Tensor:
        return normalize(x + NOISE / d**0.5 * torch.randn(x.shape, generator=generator), dim=-1)

    topics = normalize(torch.randn(TOPICS, d, generator=generator), dim=1)
    own = torch.randint(TOPICS, (options.documents, PER_DOCUMENT), generator=generator)
    vectors = noisy(topics[own.gather(1, torch.randint(PER_DOCUMENT, shape, generator=generator))])
    source = torch.randint(options.documents, (QUERIES,), generator=generator)
    chosen = torch.randperm(options.document_tokens, generator=generator)[: options.query_tokens]
    return vectors, noisy(vectors[source][:, chosen])


def _fastest(call: Callable[[int], object], times: int) -> float:
    seconds = []
    for i in range(times):
        begin = time.perf_counter()
        call(i)
        seconds.append(time.perf_counter() - begin)
    return min(seconds)


def _recall(found: Tensor, truth: Tensor) -> float:
    return (found[:, :, None] == truth[:, None]).any(2).float().mean().item()
