"""The functions of other libraries that `python -m benchmarks peers` tries, on indexes of one small set of rows."""

import importlib
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

import torch_ivf_module as own

N, D, LISTS, K = 2_000, 16, 16, 5
_NEW = torch.Generator().manual_seed(1)
X, Q = torch.randn(N, D, generator=_NEW), torch.randn(8, D, generator=_NEW)
EVEN, ODD = np.arange(0, N, 2), np.arange(1, N, 2)


class Peer(NamedTuple):
    """The functions of a library. An index is made of rows and searches all of its lists; searches give ids."""

    package: str
    module: str
    make: Callable[[Any, Tensor], Any]  # of the module and the rows
    search: Callable[[Any, Tensor], Any]  # distances (8, K) and ids (8, K)
    range: Callable[[Any], Any] | None = None
    allow: Callable[[Any], Any] | None = None  # among the odd ids
    each: Callable[[Any], Any] | None = None  # the same, as a filter for each query
    group: Callable[[], Any] | None = None  # the odd ids are a group, of which results are
    remove: Callable[[Any], Any] | None = None  # the even ids, and search
    map: Callable[[Any, str], Any] | None = None  # an index that is the file, which is to be written
    graph: Callable[[Any], nn.Module] | None = None  # what is exported, if not a module around the index


def _filled(index: Any, rows: Any, train: Any) -> Any:
    index.train(train)
    index.add(rows)
    return index


def _own_group() -> Any:
    index = own.IndexIVFFlat(D, nlist=LISTS, nprobe=LISTS).train(X)
    index.add(X, groups=torch.arange(N) % 2)
    return index.search(Q, K, params=own.SearchParams(groups=torch.ones(len(Q), dtype=torch.int64)))[1]


def _hnswlib(module: Any, rows: Tensor) -> Any:
    index = module.Index("l2", D)
    index.init_index(N, ef_construction=200)
    index.add_items(rows.numpy())
    index.set_ef(200)
    return index


def _usearch(module: Any, rows: Tensor) -> Any:
    index = module.Index(ndim=D, metric="l2sq", dtype="f32", expansion_search=200)
    index.add(np.arange(len(rows)), rows.numpy())
    return index


def _usearch_view(path: str) -> Any:
    index = importlib.import_module("usearch.index").Index.restore(path, view=True)
    index.expansion_search = 200
    return index


def _faiss(name: str, *arguments: Any, **settings: Any) -> Any:
    return getattr(importlib.import_module("faiss"), name)(*arguments, **settings)


def _scann(module: Any, rows: Tensor) -> Any:
    builder = module.builder(rows.numpy(), K, "squared_l2").tree(LISTS, LISTS).score_brute_force()
    return builder.build(docids=list(range(len(rows))))


PEERS = {
    "here": Peer(
        "torch-ivf-module", "torch_ivf_module",
        lambda m, x: _filled(m.IndexIVFFlat(D, nlist=LISTS, nprobe=LISTS, k=K), x, X), lambda i, x: i.search(x, K),
        range=lambda i: i.range_search(Q, 9.0)[2],
        allow=lambda i: i.search(Q, K, params=own.SearchParams(selector=ODD))[1],
        each=lambda i: i.search(Q, K, params=own.SearchParams(selector=[torch.from_numpy(ODD)] * len(Q)))[1],
        group=_own_group, remove=lambda i: (i.remove_ids(EVEN), i.search(Q, K)[1])[1],
        map=lambda i, path: (i.save(path), own.load(path, mmap=True))[1], graph=lambda i: i.graph(),
    ),
    "faiss": Peer(
        "faiss-cpu", "faiss", lambda m, x: _filled(m.index_factory(D, f"IVF{LISTS},Flat"), x.numpy(), X.numpy()),
        lambda i, x: i.search(x, K, params=_faiss("SearchParametersIVF", nprobe=LISTS)),
        range=lambda i: i.range_search(Q.numpy(), 9.0)[2],
        allow=lambda i: i.search(
            Q.numpy(), K, params=_faiss("SearchParametersIVF", nprobe=LISTS, sel=_faiss("IDSelectorBatch", ODD))
        )[1],
        remove=lambda i: (i.remove_ids(EVEN), i.search(Q.numpy(), K)[1])[1],
        map=lambda i, path: (_faiss("write_index", i, path), _faiss("read_index", path, 64))[1],  # IO_FLAG_MMAP
    ),
    "torch-ivf": Peer(
        "torch-ivf", "torch_ivf.index", lambda m, x: _filled(m.IndexIVFFlat(D, nlist=LISTS, nprobe=LISTS), x, X),
        lambda i, x: i.search(x, K), range=lambda i: i.range_search(Q, 9.0)[2],
    ),
    "torch-similarity-search": Peer(
        "torch-similarity-search", "torch_similarity_search",
        lambda m, x: _filled(m.IVFFlatIndex(D, LISTS, nprobe=LISTS, k=K), x, X), lambda i, x: i.search(x, K),
        graph=lambda i: i,
    ),
    "scann-core-torch": Peer(
        "scann-core-torch", "scann.torch", _scann, lambda i, x: i.search_batched(x, K)[::-1],
        remove=lambda i: (i.searcher.delete(EVEN.tolist()), i.searcher.search_batched(Q.numpy(), K)[0])[1],
    ),
    "FlashLib": Peer(
        "flashlib", "flashlib", lambda m, x: m.IVFFlat(nlist=LISTS, nprobe=LISTS).fit(x),
        lambda i, x: i.kneighbors(x, n_neighbors=K),
    ),
    "hnswlib": Peer(
        "hnswlib", "hnswlib", _hnswlib, lambda i, x: i.knn_query(x, K)[::-1],
        allow=lambda i: i.knn_query(Q, K, filter=lambda id: id % 2 == 1)[0],
        remove=lambda i: ([i.mark_deleted(id) for id in EVEN], i.knn_query(Q, K)[0])[1],
    ),
    "usearch": Peer(
        "usearch", "usearch.index", _usearch, lambda i, x: ((m := i.search(x.numpy(), K)).distances, m.keys),
        remove=lambda i: (i.remove(EVEN), i.search(Q.numpy(), K).keys)[1],
        map=lambda i, path: (i.save(path), _usearch_view(path))[1],
    ),
}  # fmt: skip
