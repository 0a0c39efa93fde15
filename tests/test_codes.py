"""The setting `codes`: searches with 8-bit codes give the answers of searches without; the copy follows the index."""

from __future__ import annotations

import pickle
import threading
from copy import deepcopy
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.datasets import PLAIN, normal, problem
from tests.problems import each_dtype, each_metric, each_problem, flat, ivf, shared
from torch_ivf_module import IndexFlatIP, IndexFlatL2, IndexIVFFlat, SearchParams, load, native
from torch_ivf_module.functional import codec
from torch_ivf_module.index import coding

DEBUG = SearchParams(debug_stats=True)

each_kind = pytest.mark.parametrize("kind", ["ivf", "flat"])  # of rows of floats


@pytest.fixture(autouse=True)
def _kernel() -> None:
    if not native.available():
        pytest.skip("codes are for the kernel")


def same(found: tuple[Tensor, Tensor], expected: tuple[Tensor, Tensor]) -> None:
    """D is the same bit by bit; I too, except among the rows of equal D."""
    assert torch.equal(found[0], expected[0])
    for distances, ids, others in zip(found[0], found[1], expected[1], strict=True):
        # The last distance may be that of more rows than there is room for.
        inner = ~(distances == distances[-1]) | (others == -1)
        assert torch.equal(ids[inner].sort().values, others[inner].sort().values)
        assert torch.equal(ids == -1, others == -1)
        assert len(ids[ids >= 0].unique()) == (ids >= 0).sum()


def same_products(found: tuple[Tensor, Tensor], expected: tuple[Tensor, Tensor]) -> None:
    """`same` for products, of which a search without codes takes any that differ by rounding: with codes, the best."""
    equal = (found[0] == expected[0]).all(1)
    assert (found[0] >= expected[0]).all()
    assert torch.allclose(found[0], expected[0], rtol=1e-5)
    same((found[0][equal], found[1][equal]), (expected[0][equal], expected[1][equal]))


def same_with_codes(index: Any, queries: Tensor, k: int, **params: Any) -> dict[str, Any]:
    """Check that searches with and without codes agree; returns the stats of that with codes."""
    index.codes = None
    expected = index.search(queries, k, params=SearchParams(**params))
    index.codes = 8
    agree = same if index.metric == "l2" else same_products
    agree(index.search(queries, k, params=SearchParams(**params)), expected)
    index.search(queries, k, params=SearchParams(debug_stats=True, **params))
    stats: dict[str, Any] = index.last_search_stats
    return stats


# --- answers ------------------------------------------------------------------------------------------------


@each_problem
@each_metric
def test_answers_are_those_without_codes(case, metric):
    index, base, queries = shared(case, metric)
    stats = same_with_codes(index, queries, case.k)
    if len(base) and len(queries):
        assert stats["mode"] == "codes"


@each_dtype
@each_metric
def test_rows_of_every_dtype(dtype, metric):
    index, _, queries = shared(problem("wide"), metric, dtype)
    assert same_with_codes(index, queries, 10)["mode"] == "codes"


@pytest.mark.parametrize("d", [1, 2, 3, 5, 31, 33, 64, 100, 4096])
@pytest.mark.parametrize("make", [IndexFlatL2, IndexFlatIP])
def test_dimensions(make, d):
    index = make(d)
    index.add(normal(300, d, seed=1))
    for nq in (1, 7, 30):
        same_with_codes(index, normal(nq, d, seed=2), 5)


@pytest.mark.parametrize("nq", [1, 2, 13, 100, 700])
@pytest.mark.parametrize("threads", [1, 3])
def test_few_rows_are_scored_exactly(nq, threads):
    index, _, _ = _large()
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        stats = same_with_codes(index, normal(nq, 64, seed=3), 10)
    finally:
        torch.set_num_threads(before)
    assert 10 * nq <= stats["rows_scored"] < 60 * nq
    assert stats["rows_read"] > 500 * nq


def test_threads_of_one_search_share_nothing():
    index, _, _ = _large()
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(8)
        for seed in range(4):
            same_with_codes(index, normal(1000, 64, seed=seed), 100)
    finally:
        torch.set_num_threads(before)


def _large(**settings: Any) -> tuple[IndexIVFFlat, Tensor, Tensor]:
    x = normal(20_000, 64, seed=1)
    index = IndexIVFFlat(64, nlist=32, nprobe=4, **settings)
    index.train(x[:4000], niter=2)
    index.add(x)
    return index, x, normal(50, 64, seed=2)


@each_kind
def test_k_above_the_rows(kind):
    index, _, queries = {"ivf": ivf, "flat": flat}[kind](PLAIN)
    same_with_codes(index, queries, 1000)


@each_metric
def test_filters(metric):
    index, base, queries = shared(problem("wide"), metric)
    ids = torch.arange(len(base))
    for chosen in (ids % 2 == 0, ids[ids % 3 == 0], ids[:5], ids[:0], torch.zeros(len(base), dtype=torch.bool)):
        same_with_codes(index, queries, 7, selector=chosen)
    # A copy of the few rows of a selector has no codes; masked rows have.
    index.search(queries[:1], 7, params=SearchParams(selector=ids[:5], debug_stats=True))
    assert index.last_search_stats["mode"] == "native"
    index.search(queries[:1], 7, params=SearchParams(selector=ids % 2 == 0, debug_stats=True))
    assert index.last_search_stats["mode"] == "codes"


@each_metric
def test_limits_of_rows(metric):
    index, _, queries = shared(problem("wide"), metric)
    for params in (
        dict(max_codes=100),
        dict(max_codes=400, nprobe=20),
        dict(candidate_budget=60),
        dict(candidate_budget=300, budget_strategy="uniform", strict_budget=True),
        dict(max_codes_cap_per_list=9),
        dict(profile="approx_fast"),
    ):
        stats = same_with_codes(index, queries, 6, **params)
        assert stats["mode"] == "codes", params


@each_metric
@each_kind
def test_pending_and_removed_rows(kind, metric):
    if kind == "flat" and metric == "cosine":
        pytest.skip("IndexFlatL2 and IndexFlatIP")
    index, base, queries = {"ivf": ivf, "flat": flat}[kind](problem("wide"), metric)
    index.codes = 8
    index.search(queries, 5)
    index.add(base[:40] + 0.01)
    same_with_codes(index, queries, 5)
    index.remove_ids(torch.arange(3, 60, 7))
    stats = same_with_codes(index, queries, 5)
    assert stats["mode"] == "codes"
    index.remove_ids(torch.arange(len(base)))
    same_with_codes(index, queries, 50)


def test_queries_that_are_not_finite():
    index, _, queries = shared(PLAIN)
    queries = queries.clone()
    queries[0, 0], queries[3, 2], queries[5] = torch.nan, torch.inf, -torch.inf
    same_with_codes(index, queries, 4)
    assert (index.search(queries, 4)[1][[0, 3, 5]] == -1).all()


@each_metric
def test_many_copies_of_a_row(metric):
    base = torch.cat([normal(200, 8, seed=1), normal(1, 8, seed=2).expand(50_000, -1)])
    index = IndexIVFFlat(8, nlist=4, nprobe=2, metric=metric)
    index.train(base[:200])
    index.add(base)
    same_with_codes(index, torch.cat([base[-1:], base[:9] * 1.01, normal(3, 8, seed=3)]), 12)


@pytest.mark.parametrize("scale", [1e-30, 1e-18, 1e-6, 1e6, 1e15])
@each_metric
def test_magnitudes(metric, scale):
    base, queries = normal(400, 12, seed=1) * scale, normal(9, 12, seed=2) * scale
    base[7] *= 1000
    index = IndexIVFFlat(12, nlist=4, nprobe=2, metric=metric)
    index.train(base[:160])
    index.add(base)
    for x in (queries, queries * 100, queries / 100, base[:9]):
        same_with_codes(index, x, 5)


@each_metric
def test_data_far_from_the_origin(metric):
    base = normal(3000, 16, seed=1) + 1000
    index = IndexIVFFlat(16, nlist=8, nprobe=3, metric=metric)
    index.train(base)
    index.add(base)
    stats = same_with_codes(index, normal(20, 16, seed=2) + 1000, 5)
    if metric == "l2":  # products and cosines of such data differ by less than their rounding errors
        assert stats["rows_scored"] < stats["rows_read"] / 4


@each_metric
def test_every_row_alike_and_rows_of_zeros(metric):
    for base in (torch.ones(500, 6), torch.zeros(500, 6), normal(500, 1, seed=1).expand(-1, 6).contiguous()):
        index = IndexIVFFlat(6, nlist=2, nprobe=2, metric=metric)
        index.train(normal(100, 6))
        index.add(base)
        same_with_codes(index, torch.cat([normal(4, 6, seed=3), base[:2], torch.zeros(1, 6)]), 9)


def test_a_list_of_several_runs():
    base = normal(codec.RUN + 5000, 4, seed=1)
    index = IndexFlatL2(4)
    index.add(base)
    stats = same_with_codes(index, normal(40, 4, seed=2), 3)
    assert stats["rows_scored"] < stats["rows_read"] / 10


def test_gradients_and_reconstruction():
    index, _, queries = shared(PLAIN)
    gradients, vectors = [], []
    for codes in (None, 8):
        index.codes = codes
        x = queries.clone().requires_grad_()
        index.search(x, 3)[0].sum().backward()
        gradients.append(x.grad)
        vectors.append(index.search_and_reconstruct(queries, 3)[2])
    assert torch.equal(*gradients)
    assert torch.equal(*vectors)


def test_modes_and_profiles_that_do_not_use_codes():
    index, _, queries = shared(PLAIN, codes=8)
    index.search(queries, 3, params=SearchParams(profile="exact", debug_stats=True))
    assert index.last_search_stats["mode"] == "exact"
    assert index.last_search_stats["rows_scored"] == index.last_search_stats["rows_read"]
    for mode in ("csr", "matrix"):
        index.search_mode = mode
        index.search(queries, 3, params=DEBUG)
        assert index.last_search_stats["mode"] == mode
        assert index.last_search_stats["rows_scored"] >= 3 * len(queries)
    assert index.store.codes.bytes == 0
    index.search_mode = "auto"
    with native.disabled():
        index.search(queries, 3)
    assert index.store.codes.bytes == 0


# --- the codes of the kernel --------------------------------------------------------------------------------


@each_dtype
@pytest.mark.parametrize("d", [1, 6, 40])
def test_codes_are_of_the_rows(dtype, d):
    index = IndexIVFFlat(d, nlist=5, nprobe=5, dtype=dtype, codes=8)
    index.train(normal(250, d))
    index.add(normal(400, d, seed=1))
    index.search(normal(1, d), 1)
    lists = index.store.segments()[1][0]
    codes = index.store.codes.get(8, lists, 0)
    for number in range(5):
        start, size = int(lists.offsets[number]), int(lists.sizes[number])
        coded = codec.unpack(codes, number)
        assert torch.equal(coded.rows.sort().values, torch.arange(size))
        rows = lists.packed[start : start + size].float()[coded.rows].double()
        centre, residual = codes.centres[number], rows - codes.centres[number].double()
        off = rows - codec.decode(coded.codes.double(), coded.scales.double(), centre.double())
        kappa, typical, _ = codes.limits[number].double()
        norms = torch.linalg.vector_norm(residual, dim=1)
        assert (torch.linalg.vector_norm(off, dim=1) <= kappa * coded.scales).all()
        assert (coded.half_squares.double() >= norms.square() / 2).all()
        assert torch.allclose(coded.half_squares.double(), norms.square() / 2, rtol=1e-4)
        assert norms.min() <= typical * 1.001
        assert typical <= norms.max() * 1.001
        assert (norms.diff() >= -1e-5 * norms.max()).all()
        bounds = codes.norms[codes.first[number] : codes.first[number + 1]].repeat_interleave(codec.PANEL, 0)[:size]
        assert ((bounds[:, 0] <= norms) & (norms <= bounds[:, 1])).all()
        assert codes.limits[number, 2] >= torch.linalg.vector_norm(centre)
        lower, upper = codec.score_bounds(rows[:3].float(), centre, coded, codes.limits[number], "l2")
        assert ((lower <= 0) & (upper >= lower)).all()


def test_torch_finds_nothing_wrong_with_the_operator():
    lists = shared(PLAIN)[0].store.segments()[1][0]
    torch.library.opcheck(
        torch.ops.torch_ivf_module.encode_lists.default, (*lists[:2], lists.sizes, lists.packed.shape[1])
    )


# --- when there are codes -----------------------------------------------------------------------------------


@pytest.fixture
def _small_is_large(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(coding, "_LEAST_VALUES", 1000)


def _pays() -> bool:
    return native.info()["isa"] != "baseline"


@pytest.mark.usefixtures("_small_is_large")
def test_auto_makes_codes_once_lists_were_visited_often():
    index, _, queries = ivf(PLAIN, nlist=4, nprobe=1)
    query = queries[:1]
    for _ in range(4 * 32 - 1):
        index.search(query, 1)
    assert index.store.codes.bytes == 0
    index.search(query, 1, params=DEBUG)
    assert (index.store.codes.bytes > 0) == _pays()
    assert (index.last_search_stats["mode"] == "codes") == _pays()
    index.codes = None
    index.codes = "auto"
    index.search(query, 1)
    assert index.store.codes.bytes == 0  # visits count from the start again
    index.search(queries[:1].expand(128, -1), 1)
    assert (index.store.codes.bytes > 0) == _pays()


def test_auto_makes_none_of_a_small_index_or_of_half_precision(monkeypatch):
    index, _, queries = ivf(PLAIN)
    for _ in range(40):
        index.search(queries, 1)
    assert index.store.codes.bytes == 0
    monkeypatch.setattr(coding, "_LEAST_VALUES", 1000)
    half, _, queries = ivf(PLAIN, dtype=torch.float16)
    for _ in range(40):
        half.search(queries, 1)
    assert half.store.codes.bytes == 0
    half.codes = 8
    half.search(queries, 1)
    assert half.store.codes.bytes > 0


@pytest.mark.parametrize("suffix", ["pt", "safetensors"])
@pytest.mark.usefixtures("_small_is_large")
def test_auto_makes_none_of_rows_in_a_file(tmp_path, suffix):
    index, _, queries = ivf(PLAIN)
    expected = index.search(queries, 5)
    path = tmp_path / f"index.{suffix}"
    index.save(path)
    many = queries.repeat(30, 1)
    for mmap, codes, made in ((True, "auto", False), (True, 8, True), (False, "auto", _pays()), (True, None, False)):
        opened = load(path, mmap=mmap, codes=codes)
        assert opened.codes == codes
        opened.search(many, 5)
        same(opened.search(queries, 5), expected)
        assert (opened.store.codes.bytes > 0) == made, (mmap, codes)
        assert coding.in_file(opened.packed_embeddings) == mmap


def test_rows_in_memory_are_in_no_file():
    assert not coding.in_file(normal(2000, 1000))
    assert not coding.in_file(normal(20, 10).share_memory_())


@pytest.mark.parametrize("value", [4, "8", True, 8.5, "no", [8], 0])
def test_wrong_settings_are_named(value):
    index = IndexFlatL2(4, codes=None)
    with pytest.raises(ValueError, match=r"codes must be 'auto', 8 or None, got"):
        index.codes = value
    assert index.codes is None
    with pytest.raises(ValueError, match="codes must be"):
        IndexIVFFlat(4, codes=value)


def test_the_setting_is_part_of_the_configuration():
    index = IndexIVFFlat(4, nlist=2)
    assert index.codes == "auto"
    assert index.config()["codes"] == "auto"
    assert ", codes=" not in repr(index)
    index.codes = 8
    assert ", codes=8" in repr(index)
    assert IndexIVFFlat(**{**index.config(), "dtype": torch.float32}).codes == 8
    assert IndexFlatIP(4, codes=None).codes is None


def test_files_keep_the_setting_and_load_overrides_it(tmp_path):
    index, _, _ = ivf(PLAIN, codes=8)
    index.save(tmp_path / "index.pt")
    assert load(tmp_path / "index.pt").codes == 8
    assert load(tmp_path / "index.pt", codes=None).codes is None
    assert IndexIVFFlat.load(tmp_path / "index.pt", codes="auto").codes == "auto"
    with pytest.raises(ValueError, match="codes must be"):
        load(tmp_path / "index.pt", codes=16)


# --- the copy follows the index -----------------------------------------------------------------------------


def test_memory_bytes_counts_the_codes():
    index, _, queries = _large()
    index.search(queries, 1)
    before = index.memory_bytes()
    index.codes = 8
    assert index.memory_bytes() == before
    index.search(queries, 1)
    more = index.memory_bytes() - before
    # 10 bytes and 64 codes for each row; up to 31 places are unused in a list.
    assert 74 * 20_000 <= more <= 74 * (20_000 + 31 * 32) + (64 + 3) * 4 * 32 + 8 * 33 + 8 * (20_000 // 32 + 32)
    index.codes = None
    assert index.memory_bytes() == before


@each_kind
def test_every_change_is_searched(kind):
    index, base, queries = {"ivf": ivf, "flat": flat}[kind](problem("wide"))
    changes = [
        lambda: index.add(base[:700] + 0.001),
        lambda: index.update(torch.tensor([3, 5]), base[:2] - 0.001),
        lambda: index.remove_ids(torch.arange(0, 500)),
        lambda: index.state_dict(),
        lambda: index.load_state_dict({k: v.clone() for k, v in index.state_dict().items()}),
        lambda: index.packed_embeddings.mul_(1.01),
        lambda: index.half(),
        lambda: index.float(),
        lambda: index.share_memory(),
        lambda: index.fit(base),
        lambda: index.reset(),
        lambda: index.add(base),
    ]
    for change in changes:
        index.codes = 8
        index.search(queries, 5)
        change()
        found = index.search(queries, 5)
        index.codes = None
        same(found, index.search(queries, 5))


@pytest.mark.parametrize("copied", [deepcopy, lambda index: pickle.loads(pickle.dumps(index))])
def test_copies_keep_the_setting_not_the_codes(copied):
    index, _, queries = ivf(PLAIN, codes=8)
    expected = index.search(queries, 5)
    made = index.store.codes.bytes
    again = copied(index)
    assert again.codes == 8
    assert again.store.codes.bytes == 0
    same(again.search(queries, 5), expected)
    assert again.store.codes.bytes == made == index.store.codes.bytes
    assert set(index.state_dict()) == {"centroids", "packed_embeddings", "list_offsets", "list_ids", "next_id"}


def test_an_index_pickled_before_it_had_the_setting():
    index, _, queries = ivf(PLAIN)
    state = index.__getstate__()
    state.pop("_codes", None)
    again = IndexIVFFlat.__new__(IndexIVFFlat)
    again.__setstate__(state)
    assert again.codes == "auto"
    same(again.search(queries, 3), index.search(queries, 3))


def test_threads_that_search_add_and_set():
    index, base, queries = ivf(problem("wide"), codes=8)
    wrong: list[BaseException] = []
    stop = threading.Event()

    def searches() -> None:
        try:
            while not stop.is_set():
                found = index.search(queries, 5)
                assert (found[0].diff(dim=1) >= 0).all()
                assert (found[1] >= 0).all()
        except BaseException as error:
            wrong.append(error)

    workers = [threading.Thread(target=searches) for _ in range(3)]
    for worker in workers:
        worker.start()
    for round_ in range(20):
        index.add(base[round_ : round_ + 30] + 0.01)
        index.codes = (None, "auto", 8)[round_ % 3]
        index.remove_ids(torch.arange(len(base) + 30 * round_, len(base) + 30 * round_ + 20))
    stop.set()
    for worker in workers:
        worker.join()
    assert wrong == []
    same_with_codes(index, queries, 5)


def test_dimensions_beyond_the_limit_are_searched_without_codes():
    index = IndexFlatL2(codec.MOST_DIM + 1, codes=8)
    index.add(normal(3, codec.MOST_DIM + 1))
    index.search(normal(1, codec.MOST_DIM + 1), 1, params=DEBUG)
    assert index.last_search_stats["mode"] == "native"
