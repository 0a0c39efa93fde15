"""Indexes of codes: equal to brute force over the decoded vectors, small, and as good as faiss's."""

from __future__ import annotations

import pickle

import pytest
import torch

from tests.datasets import PLAIN, normal, problem
from tests.kinds import as_stored, same_answers
from tests.oracle import agree, check, check_range, comparable, probed, stored_rows
from tests.problems import each_bits, each_metric, each_mode, each_problem, few_training_rows, flat_codes, ivf, shared
from tests.states import same_state, snapshot, unchanged
from torch_ivf_module import (
    IndexFlat,
    IndexFlatL2,
    IndexIVFFlat,
    IndexIVFScalarQuantizer,
    IndexScalarQuantizer,
    SearchParams,
    index_factory,
    native,
    tune,
)
from torch_ivf_module.functional import row_codes

# --- search -----------------------------------------------------------------------------------------------------


@each_problem
@each_mode
@each_bits
@each_metric
def test_search_finds_the_best_decoded_vectors_of_the_probed_lists(case, mode, bits, metric):
    index, _, queries = shared(case, metric, bits=bits, search_mode=mode)
    found = index.search(queries, case.k)
    check(found, queries, stored_rows(index), metric, case.k, probed(index, queries))


@each_problem
@each_bits
@each_metric
def test_flat_search_is_exhaustive(case, bits, metric):
    index, _, queries = flat_codes(case, metric, bits)
    check(index.search(queries, case.k), queries, stored_rows(index), metric, case.k)


@each_problem
@each_bits
@each_metric
def test_every_vector_is_stored_once_in_its_nearest_list(case, bits, metric):
    index, base, _ = shared(case, metric, bits=bits)
    ids, vectors, lists = stored_rows(index)
    assert torch.equal(ids.sort().values, torch.arange(len(base)))
    assert index.packed_codes.shape == (len(base), row_codes.width(case.d, bits))
    error = (vectors - comparable(base, metric)[ids]).abs()
    rounding = 4 * torch.finfo(torch.float32).eps if metric == "cosine" else 0
    assert (error <= row_codes.error_bound(index.packed_codes, case.d)[:, None] + rounding).all()
    assert torch.equal(index.reconstruct_batch(ids).double(), vectors)
    if case.data == "overflow":  # the distances to all centroids overflow, so any list is right
        return
    nearest = probed(index, base[ids], nprobe=1)  # of the vector that was added, not of the decoded one
    assert nearest.allowed[torch.arange(len(ids)), lists].all()


@pytest.mark.parametrize("d", [1, 2, 3, 5, 16, 33, 130])
@each_bits
@each_metric
def test_every_dimension(d, bits, metric):
    x, queries = normal(300, d), normal(20, d, seed=1)
    index = IndexIVFScalarQuantizer(d, nlist=6, nprobe=3, metric=metric, bits=bits)
    index.train(x).add(x)
    check(index.search(queries, 7), queries, stored_rows(index), metric, 7, probed(index, queries))
    radius = float(index.search(queries, 20)[0][:, -1].median())
    found = index.range_search(queries, radius)
    check_range(found, queries, stored_rows(index), metric, radius, probed(index, queries))


@each_bits
@each_metric
def test_params(bits, metric):
    """Filters, limits of rows, exact scores, and pending and deleted rows, as an index of the decoded vectors."""
    index, base, queries = shared(problem("wide"), metric, bits=bits)
    index.remove_ids(torch.arange(5))
    index.add(base[:40] * 1.5)  # pending
    plain = IndexIVFFlat(index.d, index.nlist, index.nprobe, "ip" if metric == "cosine" else metric)
    state = {**index.state_dict(), "packed_embeddings": stored_rows(index).vectors.float()}
    del state["packed_codes"]
    plain.load_state_dict(state)
    for params in (
        SearchParams(selector=torch.arange(0, 1500, 7)),
        SearchParams(selector=torch.arange(1537) % 2 == 0, nprobe=23),
        SearchParams(max_codes=300),
        SearchParams(profile="exact"),
        SearchParams(profile="approx", candidate_budget=200, list_ordering=index.list_ordering),
        SearchParams(debug_stats=True),
    ):
        own = comparable(queries, metric).float()
        one, other = index.search(queries, 9, params=params), plain.search(own, 9, params=params)
        torch.testing.assert_close(one[0], other[0], rtol=1e-4, atol=1e-5)
    assert index.last_search_stats["mode"] in ("native", "csr", "matrix")
    index.rebuild_lists()
    check(index.search(queries, 9), queries, stored_rows(index), metric, 9, probed(index, queries))


def test_memory_is_bounded_whatever_the_batch():
    index, _, queries = shared(problem("wide"), bits=8)
    expected = index.search(queries, 9)
    index.max_bytes = 1 << 14
    found = index.search(queries, 9)
    torch.testing.assert_close(found[0], expected[0], rtol=1e-5, atol=1e-5)


@each_bits
@each_metric
def test_the_kernel_decodes_to_the_same_numbers(bits, metric):
    index, _, queries = shared(problem("odd sizes"), metric, bits=bits)
    found = index.search(queries, 5)
    radius = float(found[0][:, 2].median())
    lims, within, _ = index.range_search(queries, radius)
    with native.disabled():
        agree(found, index.search(queries, 5), rtol=1e-5, atol=1e-5)
        others, expected, _ = index.range_search(queries, radius)
    assert torch.equal(lims, others)
    torch.testing.assert_close(within.sort().values, expected.sort().values, rtol=1e-5, atol=1e-5)


@each_bits
def test_codes_beside_codes_do_not_change_answers(bits):
    """The certified pass may read 8-bit codes of the decoded vectors first."""
    index, _, queries = shared(problem("wide"), bits=bits)
    expected = index.search(queries, 9)
    index.codes = 8
    agree(index.search(queries, 9), expected, rtol=1e-5, atol=1e-5)


# --- memory and recall ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("bits", "share"), [(8, 0.29), (4, 0.17)])
def test_bytes_are_a_share_of_those_of_float_rows(bits, share):
    x = normal(20_000, 128)
    for index in (IndexScalarQuantizer(128, bits), IndexIVFScalarQuantizer(128, nlist=16, bits=bits)):
        with few_training_rows():
            index.train(x[:640], niter=1).add(x)
        index.search(x[:1], 1)  # what is derived counts too
        assert index.memory_bytes() - index.centroids.nbytes <= (share + 0.001) * x.nbytes
        stored = index.packed_codes.nbytes + index.list_ids.nbytes
        assert stored <= share * x.nbytes


@each_bits
@pytest.mark.parametrize("data", ["photographs", "gaussian"])
def test_recall_is_no_lower_than_that_of_faiss(faiss, data, bits):
    if data == "photographs":
        pytest.importorskip("sklearn")
        pytest.importorskip("PIL")
        from torch_ivf_module.photographs import photograph_patches

        base, queries = map(torch.from_numpy, photograph_patches(nb=8000, nq=200))
    else:
        base, queries = normal(8000, 64), normal(200, 64, seed=1)
    d, nlist, k = base.shape[1], 32, 10
    exact = IndexFlatL2(d)
    exact.add(base)
    truth = exact.search(queries, k)[1]
    index = IndexIVFScalarQuantizer(d, nlist=nlist, bits=bits)
    with few_training_rows():
        index.train(base, niter=3).add(base)
    coarse = faiss.IndexFlatL2(d)
    coarse.add(index.centroids.numpy())
    kind = getattr(faiss.ScalarQuantizer, f"QT_{bits}bit")
    for by_residual in (False, True):
        theirs = faiss.IndexIVFScalarQuantizer(coarse, d, nlist, kind, faiss.METRIC_L2, by_residual)
        theirs.train(base.numpy())
        theirs.add(base.numpy())
        for nprobe in (4, nlist):
            theirs.nprobe = index.nprobe = nprobe
            found = torch.from_numpy(theirs.search(queries.numpy(), k)[1]), index.search(queries, k)[1]
            recall = [float((ids[:, :, None] == truth[:, None]).any(1).double().mean()) for ids in found]
            assert recall[1] >= recall[0], (by_residual, nprobe, recall)


# --- what an index does -----------------------------------------------------------------------------------------


@each_bits
def test_moving_rows_does_not_change_them(bits):
    index, base, _ = ivf(problem("wide"), bits=bits)
    before = index.packed_codes[index.list_ids.argsort()]
    with few_training_rows():
        index.train(normal(900, index.d, seed=8), niter=2)
        assert index.retrain(niter=2).total == len(base)
        index.retrain(base)
    index.rebuild_lists()
    assert torch.equal(index.packed_codes[index.list_ids.argsort()], before)
    other = IndexIVFScalarQuantizer(index.d, nlist=index.nlist, bits=bits)
    other.load_state_dict({**index.state_dict()})
    other.reset()
    other.merge_from(index)
    assert (index.ntotal, other.ntotal) == (0, len(base))
    assert torch.equal(other.packed_codes[other.list_ids.argsort()], before)
    part = other.copy_subset(torch.arange(100))
    assert torch.equal(part.packed_codes[part.list_ids.argsort()], before[:100])


def test_retraining_takes_a_sample_of_the_stored_rows():
    index, _, _ = ivf(PLAIN, bits=8)
    report = index.retrain(max_points_per_centroid=39, generator=torch.Generator().manual_seed(1))
    assert report.total == index.ntotal


@each_bits
def test_casts_do_not_change_codes(bits):
    index, _, queries = shared(PLAIN, bits=bits)
    before, answer = snapshot(index), index.search(queries, 5)
    for cast in (
        lambda: index.half(),
        lambda: index.bfloat16(),
        lambda: index.double(),
        lambda: index.to(torch.float16),
        lambda: index.type(torch.float16),
    ):
        cast()
        assert same_state(snapshot(index), before)
        assert index.dtype == torch.float32
    assert torch.equal(index.search(queries, 5)[1], answer[1])
    _, I, R = index.search_and_reconstruct(queries, 600)
    assert R.dtype == torch.float32
    assert R[I < 0].isnan().all()
    assert torch.equal(R[I >= 0], index.reconstruct_batch(I[I >= 0]))


def test_other_formats_are_refused_with_a_clear_error():
    codes = shared(PLAIN, bits=8).index
    four = shared(PLAIN, bits=4).index
    floats = shared(PLAIN).index
    for index, other, words in (
        (codes, floats, "has packed_embeddings, this index stores packed_codes"),
        (floats, codes, "has packed_codes, this index stores packed_embeddings"),
        (codes, four, r"\(n, 24\), rows of 16 codes of 8 bits, got uint8 \(500, 16\), which has codes of 4 bits"),
    ):
        for strict in (True, False):
            with unchanged(index), pytest.raises(RuntimeError, match=f"{words}.*unchanged"):
                index.load_state_dict(other.state_dict(), strict=strict)
        other.load_state_dict({**other.state_dict(), "centroids": index.centroids})
        with unchanged(index), unchanged(other), pytest.raises(ValueError, match=r"must store rows as .* to be merged"):
            index.merge_from(other)
    for make in (IndexScalarQuantizer, IndexIVFScalarQuantizer):
        for bits in (0, 5, 16, True, None, "8"):
            with pytest.raises(ValueError, match="bits must be 8 or 4"):
                make(8, bits=bits)
        with pytest.raises(ValueError, match=r"dtype must be None or torch.float32"):
            make(8, dtype=torch.float16)
        assert make(8, dtype=torch.float32).dtype == torch.float32
    for kind in (IndexFlat, IndexIVFFlat, IndexFlatL2):
        with pytest.raises(TypeError, match="bits"):
            kind(8, bits=8)


def test_states_without_finite_ranges_are_refused():
    index = shared(PLAIN, bits=8).index
    for value in (torch.inf, torch.nan):
        rows = index.packed_codes.clone()
        rows[7, -4:] = torch.tensor([value]).view(torch.uint8)
        with unchanged(index), pytest.raises(RuntimeError, match=r"packed_codes must have finite .* row 7"):
            index.load_state_dict({**index.state_dict(), "packed_codes": rows})


@each_bits
def test_rows_whose_range_float32_does_not_hold_are_refused(bits):
    index = IndexScalarQuantizer(3, bits)
    bad = torch.tensor([[1.0, 2.0, 3.0], [3e38, -3e38, 0.0]])
    with unchanged(index), pytest.raises(ValueError, match=r"x must have .*range.* row 1"):
        index.add(bad)
    with unchanged(index), pytest.raises(ValueError, match=r"x must have entries.* row 1"):
        index.add(torch.tensor([[1.0, 2.0, 3.0], [1e39, 0.0, 0.0]], dtype=torch.float64))
    index.add(bad[:1] * 1e38)
    assert index.reconstruct(0).isfinite().all()


@each_bits
@each_metric
def test_gradients(bits, metric):
    index, _, queries = shared(PLAIN, metric, bits=bits)
    x = queries.clone().requires_grad_()
    D, I = index.search(x, 4)
    torch.testing.assert_close(D.detach(), index.search(queries, 4)[0], rtol=1e-5, atol=1e-5)
    vectors = index.reconstruct_batch(I.flatten()).view(*I.shape, -1)
    y = queries.clone().requires_grad_()
    if metric == "l2":
        expected = (y[:, None] - vectors).square().sum(2)
    else:
        expected = torch.einsum("qd,qkd->qk", y if metric == "ip" else torch.nn.functional.normalize(y), vectors)
    D.sum().backward()
    expected.sum().backward()
    torch.testing.assert_close(x.grad, y.grad, rtol=1e-4, atol=1e-4)
    jacobian = torch.func.vmap(torch.func.jacrev(lambda q: index.search(q[None], 2)[0][0]))(queries[:3])
    assert jacobian.shape == (3, 2, index.d)


@each_bits
def test_pickles(bits):
    index, _, queries = shared(PLAIN, bits=bits)
    twin = pickle.loads(pickle.dumps(index))
    assert twin.config() == index.config()
    same_answers(twin, index, queries)
    twin.add(queries[:2])
    assert torch.equal(twin.reconstruct(501), as_stored(twin, queries)[1])


def test_tune():
    index, _, queries = shared(problem("wide"), bits=8)
    found = tune(index, queries, target_recall=0.9, k=5, apply=True)
    assert found.reached
    assert index.nprobe == found.nprobe


# --- the factory ------------------------------------------------------------------------------------------------

RECIPES = {
    "Flat": IndexFlat(8),
    "SQ8": IndexScalarQuantizer(8),
    "SQ4": IndexScalarQuantizer(8, bits=4),
    "SQfp16": IndexFlat(8, dtype=torch.float16),
    "SQbf16": IndexFlat(8, dtype=torch.bfloat16),
    "IVF5,Flat": IndexIVFFlat(8, nlist=5),
    "IVF5,SQ8": IndexIVFScalarQuantizer(8, nlist=5),
    "IVF5,SQ4": IndexIVFScalarQuantizer(8, nlist=5, bits=4),
    "IVF5,SQfp16": IndexIVFFlat(8, nlist=5, dtype=torch.float16),
}


@pytest.mark.parametrize("recipe", RECIPES)
def test_factory(recipe):
    index = index_factory(8, recipe)
    assert type(index) is type(RECIPES[recipe])
    assert index.config() == RECIPES[recipe].config()
    assert index_factory(8, recipe, "ip", k=3).config() == {**index.config(), "metric": "ip", "k": 3}
    assert index_factory(8, f"L2norm,{recipe}", "ip").config() == {**index.config(), "metric": "cosine"}
    behind = index_factory(8, f"L2norm,{recipe}")
    assert behind.index.config() == index.config()
    x = normal(250, 8)
    with few_training_rows():
        behind.fit(x).add(x)
    assert behind.search(x[:3] * 7, 1)[1].flatten().tolist() == [0, 1, 2]


UNKNOWN = ["", "Flatt", "PCA4,Flat", "OPQ2,SQ8", "IVF,Flat", "IVF4", "HNSW8", "SQ6", "IVF4,IVF4,Flat"]


@pytest.mark.parametrize("recipe", UNKNOWN)
def test_factory_refuses_other_strings(recipe):
    with pytest.raises(ValueError, match=r"description must be one of Flat, SQ8.*got"):
        index_factory(8, recipe)
