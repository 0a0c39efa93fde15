"""Answers do not depend on batches, strides, dtypes of the input, memory limits, autocast or torch's defaults."""

from __future__ import annotations

import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tests.datasets import PLAIN, Problem, lattice, normal, problem
from tests.oracle import agree, check, probed, stored_rows
from tests.problems import MODES, defaults, each_dtype, each_metric, each_mode, flat, ivf, shared
from tests.states import same_state, snapshot, unchanged
from torch_ivf_module import IndexFlatL2, IndexIVFFlat, SearchParams


@each_dtype
@each_metric
def test_modes_agree(dtype, metric):
    case = problem("wide")
    answers = [
        index.search(queries, case.k)
        for index, _, queries in (shared(case, metric, dtype, search_mode=mode) for mode in MODES)
    ]
    for answer in answers[1:]:
        agree(answer, answers[0], rtol=1e-5, atol=1e-5)


@each_mode
@each_metric
def test_answers_do_not_depend_on_the_batch(mode, metric):
    index, _, queries = shared(problem("wide"), metric, search_mode=mode)
    expected = index.search(queries, 10)
    for size in (1, 8, 50):
        parts = [index.search(part, 10) for part in queries.split(size)]
        agree(tuple(map(torch.cat, zip(*parts, strict=True))), expected, rtol=1e-5, atol=1e-5)


@each_mode
@pytest.mark.parametrize("name", ["plain", "ties", "duplicates", "zero vectors"])
def test_the_same_call_gives_the_same_answer(mode, name):
    index, _, queries = shared(problem(name), "l2", search_mode=mode)
    D, I = index.search(queries, 10)
    second = index.search(queries, 10)
    assert torch.equal(D, second[0])
    assert torch.equal(I, second[1])


@each_mode
@each_metric
def test_bad_queries_do_not_disturb_others(mode, metric):
    index, _, queries = shared(problem("bad queries"), metric, search_mode=mode)
    good = queries.isfinite().all(1)
    D, I = index.search(queries, 10)
    assert (I[~good] == -1).all()
    assert D[~good].isinf().all()
    agree((D[good], I[good]), index.search(queries[good], 10), rtol=1e-5, atol=1e-5)


@each_mode
@each_dtype
@each_metric
def test_queries_of_any_floating_type(mode, dtype, metric):
    """Values that are exact in all dtypes give the same answers."""
    index, _, queries = shared(PLAIN, metric, dtype, search_mode=mode)
    queries = lattice(*queries.shape) + 0.5
    plain = index.search(queries, 10)
    for kind in (torch.float64, torch.float16, torch.bfloat16):
        agree(index.search(queries.to(kind), 10), plain, rtol=1e-5, atol=1e-5)


@each_dtype
def test_vectors_of_any_floating_type(dtype):
    base = lattice(200, 8) + 0.5
    index = IndexIVFFlat(8, nlist=4, nprobe=4, dtype=dtype)
    index.train(base)
    for kind in (torch.float64, torch.float32, torch.float16, torch.bfloat16):
        index.add(base.to(kind))
    assert index.packed_embeddings.dtype == dtype
    assert torch.equal(stored_rows(index).vectors[stored_rows(index).ids.argsort()], base.double().repeat(4, 1))


STRIDES = {
    "transposed": lambda x: x.t().contiguous().t(),
    "every other row": lambda x: x.repeat_interleave(2, 0)[::2],
    "every other column": lambda x: x.repeat_interleave(2, 1)[:, ::2],
    "offset": lambda x: torch.cat([x[:1], x])[1:],
    "a slice of columns": lambda x: torch.cat([x, x, x], 1)[:, x.shape[1] : 2 * x.shape[1]],
}


@each_mode
@pytest.mark.parametrize("layout", STRIDES)
def test_strides_do_not_matter(mode, layout):
    index, base, queries = shared(PLAIN, "l2", search_mode=mode)
    plain = index.search(queries, 10)
    agree(index.search(STRIDES[layout](queries), 10), plain, rtol=1e-5, atol=1e-5)
    index.reset()
    with torch.no_grad():
        index.add_with_ids(STRIDES[layout](base), torch.arange(len(base)).repeat_interleave(2)[::2])
    agree(index.search(queries, 10), plain, rtol=1e-5, atol=1e-5)


@each_mode
def test_one_query_expanded(mode):
    index, _, queries = shared(PLAIN, "l2", search_mode=mode)
    D, I = index.search(queries[:1].expand(9, -1), 10)
    agree((D, I), tuple(part.expand(9, -1) for part in index.search(queries[:1], 10)), rtol=1e-5, atol=1e-5)


@each_mode
@each_metric
@pytest.mark.parametrize("max_bytes", [1, 1 << 12, 1 << 16])
def test_little_memory_gives_the_same_answers(mode, metric, max_bytes):
    case = problem("wide")
    index, _, queries = shared(case, metric, search_mode=mode)
    plain = index.search(queries, case.k)
    index.max_bytes = max_bytes
    agree(index.search(queries, case.k), plain, rtol=1e-5, atol=1e-5)


class LiveBytes(TorchDispatchMode):
    """The peak number of bytes of the tensors created inside the block."""

    def __init__(self) -> None:
        super().__init__()
        self.live: dict[StorageWeakRef, int] = {}
        self.known: set[int] = set()
        self.peak = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        for tensor in tree_leaves((args, kwargs)):
            self.count(tensor, own=False)
        out = func(*args, **(kwargs or {}))
        known = len(self.live)
        for tensor in tree_leaves(out):
            self.count(tensor, own=True)
        if len(self.live) > known:
            self.live = {ref: size for ref, size in self.live.items() if not ref.expired()}
            self.peak = max(self.peak, sum(self.live.values()))
        return out

    def count(self, tensor: object, own: bool) -> None:
        if not isinstance(tensor, torch.Tensor) or tensor.layout != torch.strided:
            return
        ref = StorageWeakRef(tensor.untyped_storage())
        if ref not in self.live:
            self.live[ref] = tensor.untyped_storage().nbytes() if own else 0


LARGE = {
    "many queries": Problem("many queries", nb=5000, d=8, nq=9000, nlist=16, nprobe=2, k=4),
    "many probes": Problem("many probes", nb=10_000, d=8, nq=150, nlist=256, nprobe=256),
    "one long list": Problem("one long list", nb=20_000, d=8, nq=300, nlist=1, nprobe=1),
    "one vector many times": Problem(
        "one vector many times", "identical", nb=20_000, d=8, nq=40, nlist=1, nprobe=1
    ),
}


@each_mode
@pytest.mark.parametrize("name", LARGE)
def test_memory_stays_within_the_bound(mode, name):
    case = LARGE[name]
    index, _, queries = shared(case, search_mode=mode, max_bytes=8 << 20)
    index.search(queries[:2], case.k)  # derived data that is computed once is not part of the workspace
    with LiveBytes() as memory:
        D, I = index.search(queries, case.k)
    workspace = memory.peak - D.nbytes - I.nbytes
    assert workspace <= index.max_bytes, f"{workspace / 2**20:.1f} MiB of workspace"
    index.max_bytes = 1 << 30
    agree((D, I), index.search(queries, case.k), rtol=1e-6)


LONG = {
    "more queries than a tile holds": Problem("", nb=300, d=4, nq=9000, nlist=2, nprobe=1, k=3),
    "more candidates than a slice holds": Problem("", nb=300_000, d=2, nq=3, nlist=3, nprobe=3, k=4),
    "a list of many numbers": Problem("", nb=70_000, d=64, nq=2, nlist=1, nprobe=1, k=4),
}


@each_mode
@pytest.mark.parametrize("name", LONG)
def test_sizes_beyond_one_chunk(mode, name):
    case = LONG[name]
    index, _, queries = shared(case, search_mode=mode)
    check(index.search(queries, case.k), queries, stored_rows(index), "l2", case.k, probed(index, queries))


@each_mode
@each_metric
def test_autocast_does_not_change_answers(mode, metric):
    plain, _, queries = shared(PLAIN, metric, search_mode=mode)
    expected = plain.search(queries, 10)
    radius = float(expected[0][:, 5].median())
    ranges = plain.range_search(queries, radius)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside, _, _ = ivf(PLAIN, metric)
        inside.search_mode = mode
        found = inside.search(queries, 10)
        found_ranges = plain.range_search(queries, radius)
    assert torch.equal(plain.centroids, inside.centroids)
    assert torch.equal(plain.list_ids, inside.list_ids)
    agree(found, expected, rtol=1e-6, atol=1e-6)
    assert torch.equal(found_ranges[0], ranges[0])


SETTINGS = {
    "default dtype float64": lambda: defaults(dtype=torch.float64),
    "default dtype bfloat16": lambda: defaults(dtype=torch.bfloat16),
    "default device meta": lambda: defaults(device="meta"),
    "inference mode": torch.inference_mode,
    "no gradients": torch.no_grad,
}


@each_mode
@each_metric
@pytest.mark.parametrize("kind", ["ivf", "flat"])
@pytest.mark.parametrize("setting", SETTINGS)
def test_answers_do_not_depend_on_global_settings_of_torch(kind, setting, metric, mode):
    """Models are often built and run with another default dtype or device."""
    if (kind, metric) == ("flat", "cosine"):
        return
    make = ivf if kind == "ivf" else flat
    _, base, queries = reference = make(PLAIN, metric)
    reference = reference.index
    expected = reference.search(queries, 10)
    radius = float(expected[0][:, 5].median())
    ranges = reference.range_search(queries, radius)
    ivf_settings = {"nlist": PLAIN.nlist, "metric": metric} if kind == "ivf" else {}
    index = type(reference)(PLAIN.d, **ivf_settings)
    with SETTINGS[setting]():
        if kind == "ivf":
            index.train(base, niter=4)
            index.nprobe = PLAIN.nprobe
        index.search_mode = mode
        index.add(base[:200])
        index.add_with_ids(base[200:], torch.arange(200, len(base), device="cpu"))
        found = index.search(queries, 10)
        found_ranges = index.range_search(queries, radius)
        index.add(base[:1])
        index.remove_ids(torch.tensor([len(base)], device="cpu"))
        index.update(torch.tensor([7], device="cpu"), base[7:8])
    assert same_state(
        {name: value for name, value in snapshot(index).items() if name in ("centroids", "list_offsets")},
        {name: value for name, value in snapshot(reference).items() if name in ("centroids", "list_offsets")},
    )
    assert found[0].dtype == torch.float32
    agree(found, expected, rtol=1e-6, atol=1e-6)
    assert torch.equal(found_ranges[0], ranges[0])
    agree(index.search(queries, 10), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("setting", ["default dtype float64", "default dtype bfloat16"])
def test_an_index_made_under_another_default_dtype(setting):
    with SETTINGS[setting]():
        for index in (IndexIVFFlat(8, nlist=2), IndexFlatL2(8)):
            assert index.centroids.dtype == index.packed_embeddings.dtype == torch.float32
            if isinstance(index, IndexIVFFlat):
                index.train(normal(100, 8).float())
            index.add(normal(100, 8).float())
            assert index.centroids.dtype == index.packed_embeddings.dtype == torch.float32
            assert index.search(normal(3, 8).float(), 4)[0].dtype == torch.float32


@each_mode
@pytest.mark.parametrize("kind", ["ivf", "flat"])
def test_search_does_not_change_the_index(mode, kind):
    index, _, queries = shared(PLAIN, search_mode=mode) if kind == "ivf" else flat(PLAIN)
    queries_before = queries.clone()
    with unchanged(index):
        index.search(queries, 10, params=SearchParams(nprobe=3))
        index.range_search(queries, 10.0)
        index(queries)
    assert torch.equal(queries, queries_before)


@each_mode
def test_answers_do_not_depend_on_a_translation(mode):
    """Multiples of 1/64 are exact after 1,000 is added, and so are their differences."""
    base, queries = (normal(800, 24, seed=3) * 64).round() / 64, (normal(60, 24, seed=4) * 64).round() / 64
    answers = []
    for shift in (0, 1000):
        index = IndexIVFFlat(24, nlist=16, nprobe=16)
        index.train(base + shift)
        index.add(base + shift)
        index.search_mode = mode
        answers.append(index.search(queries + shift, 10))
    agree(*answers, rtol=1e-6)
    exhaustive = IndexFlatL2(24)
    exhaustive.add(base + 1000)
    agree(exhaustive.search(queries + 1000, 10), answers[0], rtol=1e-6)


@each_mode
def test_a_stored_vector_is_at_distance_zero_from_itself(mode):
    index, base, _ = shared(PLAIN, "l2", search_mode=mode)
    D, I = index.search(base[:50], 1)
    assert torch.equal(I[:, 0], torch.arange(50))
    assert (D == 0).all()
