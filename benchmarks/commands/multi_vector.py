"""Late interaction: `MaxSim` beside a loop over documents, and beside one matrix product, on a synthetic corpus.

Every document is about 12 of 2,000 topics; its tokens are noisy unit vectors of them. A query is some tokens of one
document with new noise. Searches of one query and of 16; a time is the best of several, of one query.

Q queries, T tokens per query, M documents, W tokens per document, d dim.
"""

import argparse
import time
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from torch.nn.functional import normalize

from torch_ivf_module import IndexIVFFlat, MaxSim, SearchParams

from .. import machine

K, TOPICS, PER_DOCUMENT, NOISE, QUERIES = 10, 2000, 12, 0.6, 16
SETTINGS = ((1, 32, 64), (2, 128, 128), (8, 512, 128), (8, 512, 512))  # nprobe, neighbours, candidates


def add_arguments(parser: argparse.ArgumentParser) -> None:
    option = parser.add_argument
    option("--documents", type=int, default=10_000, help="default: 10,000")
    option("--document-tokens", type=int, default=64, help="vectors of a document (default: 64)")
    option("--query-tokens", type=int, default=32, help="vectors of a query, at most those of a document (default: 32)")
    option("--d", type=int, default=128, help="dimension (default: 128)")
    option("--nlist", type=int, default=1024, help="lists (default: 1024)")
    machine.add_arguments(parser)


def run(options: argparse.Namespace) -> int:
    machine.set_threads(options.threads)
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
    print("| | ms, one query | × loop | ms per query of 16 | × loop | recall@10 |")
    print("| --- | ---: | ---: | ---: | ---: | ---: |")
    print(f"| loop over documents | {1e3 * base:.1f} | 1 | – | – | 1 |")
    found = torch.stack([product(query) for query in queries])
    _row("one matrix product", _fastest(lambda i: product(queries[i]), 3), None, base, _recall(found, truth))
    for nprobe, neighbours, candidates in ((options.nlist, 1, 1), *SETTINGS):
        searcher, params = MaxSim(index, neighbours=neighbours, candidates=candidates), SearchParams(nprobe=nprobe)
        search = partial(searcher.search, k=K, params=params)
        found = search(queries)[1]
        one = _fastest(lambda i, search=search: search(queries[i : i + 1]), 8)
        many = _fastest(lambda _, search=search: search(queries), 3) / QUERIES
        name = f"nprobe {nprobe}, neighbours {neighbours}, candidates {candidates}"
        name = "all lists" if nprobe == options.nlist else name
        _row(name, one, many, base, _recall(found, truth))
    shape = f"{options.documents:,} documents × {options.document_tokens} tokens × {options.d}"
    print(f"\n{shape}, queries of {options.query_tokens} tokens, nlist {options.nlist}, threads {options.threads}")
    return 0


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


def _row(name: str, one: float, many: float | None, base: float, recall: float) -> None:
    batch = "– | –" if many is None else f"{1e3 * many:.1f} | {base / many:.1f}"
    print(f"| {name} | {1e3 * one:.1f} | {base / one:.1f} | {batch} | {recall:.4f} |")
