"""The same answers as faiss on the same centroids and lists: equal ids up to ties, distances within 1e-4."""

from __future__ import annotations

import functools

import numpy as np
import pytest
import torch

from tests.datasets import Problem, normal, problem
from tests.oracle import agree, probed, stored_rows, unit
from tests.problems import METRICS, each_flat_metric, each_metric, each_mode, flat, ivf, shared
from torch_ivf_module import IndexIVFFlat, SearchParams

CASES = [
    "plain",
    "wide",
    "odd sizes",
    "d=1",
    "k above the candidates",
    "empty lists",
    "one list holds everything",
    "more lists than vectors",
    "duplicates",
    "nothing added",
]
GAUSSIAN = Problem("gaussian against faiss", nb=20_000, d=64, nq=500, nlist=64, nprobe=8, k=20)


def faiss_of(faiss, index):
    """A faiss index with the centroids and the lists of `index`, row for row."""
    measure = faiss.METRIC_L2 if index.metric == "l2" else faiss.METRIC_INNER_PRODUCT
    quantizer = (faiss.IndexFlatL2 if index.metric == "l2" else faiss.IndexFlatIP)(index.d)
    quantizer.add(index.centroids.numpy())
    other = faiss.IndexIVFFlat(quantizer, index.d, index.nlist, measure)
    state = index.state_dict()
    vectors, ids, offsets = (state[name] for name in ("packed_embeddings", "list_ids", "list_offsets"))
    vectors, ids = vectors.float().contiguous().numpy(), ids.numpy()
    for number, (start, end) in enumerate(zip(offsets[:-1].tolist(), offsets[1:].tolist(), strict=True)):
        if end > start:
            codes = vectors[start:end].view("uint8").reshape(-1)
            other.invlists.add_entries(
                number, end - start, faiss.swig_ptr(ids[start:end]), faiss.swig_ptr(codes)
            )
    other.ntotal, other.nprobe = index.ntotal, index.nprobe
    return other


def prepared(queries, metric):
    """The queries for faiss: at unit length for cosine, which faiss computes as the inner product of unit vectors."""
    return (unit(queries).float() if metric == "cosine" else queries).contiguous().numpy()


def answers(metric, D, I):
    """The results of faiss as tensors, with this project's padding."""
    D, I = torch.from_numpy(D), torch.from_numpy(I)
    return D.masked_fill(I < 0, torch.inf if metric == "l2" else -torch.inf), I


def compare(index, other, queries, k):
    """Assert that both indexes give the same answers to all queries whose nearest lists are not tied."""
    found = index.search(queries, k)
    theirs = answers(index.metric, *other.search(prepared(queries, index.metric), k))
    lists = probed(index, queries)
    clear = (lists.required == lists.allowed).all(1)
    assert clear.double().mean() > 0.95
    agree(*((D[clear], I[clear]) for D, I in (found, theirs)), atol=2e-6 * _largest_product(index, queries))


# In one dimension there are two directions, so by inner product the lists of every query are tied.
@pytest.mark.parametrize(
    ("name", "metric"), [(n, m) for n in CASES for m in METRICS if n != "d=1" or m == "l2"]
)
@each_mode
def test_search_as_faiss(faiss, name, mode, metric):
    index, _, queries = shared(problem(name), metric, search_mode=mode)
    compare(index, faiss_of(faiss, index), queries, index.k)


@pytest.fixture(scope="module")
def gaussian():
    return {metric: ivf(GAUSSIAN, metric) for metric in METRICS}


@each_mode
@each_metric
def test_gaussian_vectors_as_faiss(faiss, gaussian, metric, mode):
    index, _, queries = gaussian[metric]
    index.search_mode = mode
    other = faiss_of(faiss, index)
    for nprobe, k in ((1, 5), (8, 20), (64, 20)):
        index.nprobe = other.nprobe = nprobe
        compare(index, other, queries, k)


def _largest_product(index, queries):
    """The largest product of norms, in proportion to the rounding of inner products; 0 for l2."""
    if index.metric == "l2" or index.ntotal == 0:
        return 0.0
    longest = 1.0 if index.metric == "cosine" else float(queries.norm(dim=1).max())
    return longest * float(stored_rows(index).vectors.norm(dim=1).max())


@each_metric
@pytest.mark.parametrize("name", ["plain", "wide", "d=1", "empty lists", "duplicates"])
def test_range_search_as_faiss(faiss, name, metric):
    """max_codes is ignored, as faiss does."""
    index, _, queries = shared(problem(name), metric)
    if name == "d=1" and metric != "l2":  # centroids of equal products, any of which may be probed
        index.nprobe = index.nlist
    other = faiss_of(faiss, index)
    middle = float(index.search(queries, 8)[0][:, 7].median())
    radius = middle + 0.013 if metric == "l2" else middle - 0.013
    index.max_codes = other.max_codes = 5
    lims, D, I = index.range_search(queries, radius)
    their_lims, theirs, J = other.range_search(prepared(queries, metric), radius)
    assert lims.tolist() == their_lims.tolist()
    assert lims[-1] > 0
    for start, end in zip(lims[:-1].tolist(), lims[1:].tolist(), strict=True):
        order, other_order = I[start:end].argsort(), J[start:end].argsort()
        assert I[start:end][order].tolist() == J[start:end][other_order].tolist()
        expected = torch.from_numpy(theirs[start:end][other_order])
        atol = 2e-6 * _largest_product(index, queries) + 1e-12
        torch.testing.assert_close(D[start:end][order], expected, rtol=1e-4, atol=atol)


@pytest.fixture(scope="module")
def among(faiss, gaussian):
    """A function that searches 1/share of the vectors, chosen at random, with faiss; cached for the modes."""

    @functools.cache
    def search(metric, share):
        index, _, queries = gaussian[metric]
        index.nprobe = 8
        other = faiss_of(faiss, index)
        ids = normal(20_000, seed=share).argsort()[: 20_000 // share]
        settings = faiss.SearchParametersIVF(sel=faiss.IDSelectorBatch(ids.numpy()), nprobe=12)
        theirs = answers(metric, *other.search(prepared(queries, metric), 10, params=settings))
        radius = float(theirs[0][:, 3].median()) + (0.013 if metric == "l2" else -0.013)
        lims, _, I = other.range_search(prepared(queries, metric), radius, params=settings)
        return ids, theirs, radius, [sorted(part.tolist()) for part in np.split(I, lims[1:-1].astype(np.int64))]

    return search


@pytest.mark.parametrize("share", [2, 40, 1000])
@each_mode
@each_metric
def test_selectors_as_faiss(among, gaussian, metric, mode, share):
    index, _, queries = gaussian[metric]
    index.search_mode, index.nprobe = mode, 8
    ids, theirs, radius, inside = among(metric, share)
    lists = probed(index, queries, nprobe=12)
    clear = (lists.required == lists.allowed).all(1)
    for selector in (ids, torch.zeros(20_000, dtype=torch.bool).index_fill_(0, ids, True)):
        params = SearchParams(selector=selector, nprobe=12)
        found = index.search(queries, 10, params=params)
        agree(*((D[clear], I[clear]) for D, I in (found, theirs)), atol=2e-6 * _largest_product(index, queries))
        lims, _, I = index.range_search(queries, radius, params=params)
        for q in clear.nonzero()[:, 0].tolist():
            assert I[lims[q] : lims[q + 1]].sort().values.tolist() == inside[q]


@each_mode
@each_metric
def test_max_codes_as_faiss(faiss, gaussian, metric, mode):
    """faiss also reads a part of the first list that does not fit. With the rows read here as max_codes it agrees."""
    index, _, queries = gaussian[metric]
    index.search_mode, index.nprobe, queries = mode, 8, queries[:30]
    other = faiss_of(faiss, index)
    params = SearchParams(max_codes=1200, debug_stats=True)
    lists = probed(index, queries, max_codes=1200)
    clear = (lists.required == lists.allowed).all(1)
    assert clear.double().mean() > 0.9
    for query in queries[clear].split(1):
        found = index.search(query, 10, params=params)
        settings = faiss.SearchParametersIVF(nprobe=8, max_codes=index.last_search_stats["rows_read"])
        theirs = answers(metric, *other.search(prepared(query, metric), 10, params=settings))
        agree(found, theirs, atol=2e-6 * _largest_product(index, queries))


@each_flat_metric
def test_flat_as_faiss(faiss, metric):
    index, base, queries = flat(problem("wide"), metric)
    other = (faiss.IndexFlatL2 if metric == "l2" else faiss.IndexFlatIP)(index.d)
    other.add(base.numpy())
    theirs = answers(metric, *other.search(queries.numpy(), 21))
    agree(
        index.search(queries, 21),
        theirs,
        atol=2e-6 * float(queries.norm(dim=1).max() * base.norm(dim=1).max()),
    )
    radius = float(theirs[0][:, 10].median()) + 0.013
    assert (
        index.range_search(queries, radius)[0].tolist()
        == other.range_search(queries.numpy(), radius)[0].tolist()
    )


@each_metric
def test_vectors_are_assigned_to_the_lists_that_faiss_chooses(faiss, metric):
    index, base, _ = shared(problem("wide"), metric)
    other = faiss_of(faiss, index)
    _, nearest = other.quantizer.search(prepared(base, metric), 1)
    ids, _, lists = stored_rows(index)
    assert torch.equal(torch.from_numpy(nearest[:, 0])[ids], lists)


def test_recall_on_clustered_vectors_as_faiss(faiss):
    """On clustered vectors, with centroids trained here and by faiss, the recall is the same within 0.01."""
    centres = normal(40, 16, seed=8) * 4
    base = centres.repeat(100, 1) + normal(4000, 16, seed=9)
    queries = centres.repeat(3, 1) + normal(120, 16, seed=10)
    index = IndexIVFFlat(16, nlist=40)
    index.train(base)
    index.add(base)
    other = faiss.index_factory(16, "IVF40,Flat")
    other.train(base.numpy())
    other.add(base.numpy())
    truth = torch.cdist(queries, base).topk(10, largest=False).indices
    other.nprobe = 4
    ours = index.search(queries, 10, params=SearchParams(nprobe=4))[1]
    theirs = torch.from_numpy(other.search(queries.numpy(), 10)[1])
    recall = [(found[:, :, None] == truth[:, None]).any(2).double().mean() for found in (ours, theirs)]
    assert recall[0] > recall[1] - 0.01
