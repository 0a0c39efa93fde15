"""The kernel in C++: its functions by themselves, and what it proves.

The grid of tests/test_search.py runs with the kernel too, as search_mode="auto". Without a built kernel (`python -m
torch_ivf_module build-native`) what is here is skipped; tests/test_native_build.py needs none.

Q queries, N vectors, d dim, L lists, P probes.
"""

from __future__ import annotations

import math

import pytest
import torch

from tests.datasets import normal, problem
from tests.oracle import agree
from tests.problems import DTYPES, flat, shared
from torch_ivf_module import IndexFlatIP, IndexFlatL2, SearchParams, native
from torch_ivf_module.functional.cells import Cells, cells_of, cells_probed
from torch_ivf_module.functional.lists import InvertedLists
from torch_ivf_module.native.ops import NativeKernel

pytestmark = pytest.mark.skipif(not native.available(), reason="no kernel: python -m torch_ivf_module build-native")


# --- data that is meant to break the certificate ------------------------------------------------------------------


def _near_duplicates(n, d):
    return normal(1, d, seed=1) + 1e-6 * normal(n, d, seed=2)


def _one_enormous(n, d):
    out = normal(n, d, seed=3)
    out[n // 2] *= 1e6
    return out


def _mixed_scales(n, d):
    return normal(n, d, seed=4) * torch.logspace(-12, 12, n)[:, None]


ADVERSARIES = {
    "gaussian": lambda n, d: normal(n, d, seed=5),
    "ties": lambda n, d: normal(n, d, seed=6).sign(),
    "all equal": lambda n, d: normal(1, d, seed=7).expand(n, d).contiguous(),
    "near duplicates": _near_duplicates,
    "a huge offset": lambda n, d: normal(n, d, seed=8) + 1e6,
    "an enormous vector": _one_enormous,
    "mixed scales": _mixed_scales,
    "denormal": lambda n, d: normal(n, d, seed=9) * 1e-40,
    "squares that vanish": lambda n, d: normal(n, d, seed=10) * 1e-25,
    "zeros": lambda n, d: torch.zeros(n, d),
    "one bright place": lambda n, d: torch.eye(d)[torch.arange(n) % d] * 3e4 + 1e-3 * normal(n, d, seed=11),
}


def _queries_near(base):
    """Queries of all kinds: stored vectors, vectors beside them, and others."""
    some = base[:: max(1, len(base) // 20)]
    return torch.cat([some, some * (1 + 1e-5) + 1e-6, normal(10, base.shape[1], seed=13) * base.abs().amax() / 3])


@pytest.mark.parametrize("name", ADVERSARIES)
def test_answers_on_such_data_are_those_of_float32(name):
    base = ADVERSARIES[name](600, 24)
    queries = _queries_near(base)
    plain = IndexFlatL2(24, search_mode="csr")
    plain.add(base)
    expected = plain.search(queries, 10)
    index = IndexFlatL2(24, search_mode="auto")
    index.add(base)
    found = index.search(queries, 10, params=SearchParams(debug_stats=True))
    agree(found, expected, atol=1e-37)
    stats = index.last_search_stats
    if name in ("all equal", "near duplicates"):
        assert stats["searched_again"] > 0  # nothing tells equal rows apart, so nothing is certain
    if name == "gaussian":
        assert stats["certified"] >= 40  # all but the queries from elsewhere


@pytest.mark.long
def test_a_million_random_queries_of_hard_data():
    left, seed = 1_000_000, 0
    while left > 0:
        generator = torch.Generator().manual_seed(seed)
        pick = lambda *choices: choices[int(torch.randint(len(choices), (1,), generator=generator))]  # noqa: B023,E731
        n, d = pick(40, 300, 2_000), pick(2, 5, 16, 33)
        kind, scale, offset = pick(*ADVERSARIES), pick(1e-8, 1.0, 1e4), pick(0.0, 0.0, 100.0)
        base = ADVERSARIES[kind](n, d) * scale + offset * scale
        queries = base[torch.randint(n, (10_000,), generator=generator)]
        queries = queries + pick(0.0, 1e-6, 0.1) * scale * torch.randn(10_000, d, generator=generator)
        answers = []
        for mode in ("csr", "auto"):
            index = IndexFlatL2(d, search_mode=mode)
            index.add(base)
            answers.append(index.search(queries, 5))
        agree(*reversed(answers), atol=1e-37)
        left, seed = left - len(queries), seed + 1


def test_distances_that_overflow_beside_others_in_a_small_index():
    base = normal(15, 8, seed=20) * 3e18
    for dtype in DTYPES:
        if dtype == torch.float16:
            continue
        answers = []
        for mode in ("csr", "auto"):
            index = IndexFlatL2(8, dtype=dtype, search_mode=mode)
            index.add(base)
            answers.append(index.search(base.repeat(4, 1), 10))
        agree(*answers)


def test_products_that_overflow_do_not_take_the_place_of_others():
    index = IndexFlatIP(4, codes=None)
    index.add(torch.cat([torch.ones(1, 4), torch.full((40, 4), 1e25)]))
    D, I = index.search(torch.full((1, 4), 1e18), 1)
    assert I.tolist() == [[0]]
    assert D.item() == pytest.approx(4e18)


def test_a_default_device_changes_nothing():
    index, _, queries = shared(problem("plain"), "l2", search_mode="auto")
    expected = index.search(queries, 5)
    with torch.device("meta"):
        found = index.search(queries, 5)
    agree(found, expected)


# --- its functions by themselves ----------------------------------------------------------------------------


def _arguments(dtype=torch.float32, limits=False):
    index, _, queries = shared(problem("plain"), "l2", dtype)
    lists = index.store.segments()[1][0]
    probes = torch.arange(len(queries))[:, None].add(torch.arange(3)).remainder(problem("plain").nlist)
    most = lists.sizes[probes] // 2 if limits else None
    return queries, lists.packed, lists.bias, lists.offsets, lists.sizes, probes, most, 5, 1 << 20


def _index_arguments(dtype=torch.float32):
    """The coarse quantizer and the one segment of the index of `_arguments`."""
    coarse, (lists,) = shared(problem("plain"), "l2", dtype).index.store.segments()
    return [coarse.centroids, coarse.bias, coarse.origin], list(lists)


@pytest.mark.parametrize("threads", [1, 3])
def test_rows_above_a_threshold(threads):
    queries, packed, bias, offsets, sizes, probes, *_ = _arguments()
    lists = queries, packed, bias, offsets, sizes, probes
    scores, rows = torch.ops.torch_ivf_module.scan(*lists, None, 20, 1 << 20)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        lims, found = torch.ops.torch_ivf_module.scan_above(*lists, scores[:, 9] - 1e-6)
    finally:
        torch.set_num_threads(before)
    assert torch.equal(lims, torch.arange(0, 10 * len(queries) + 1, 10))
    assert torch.equal(found.view(-1, 10).sort().values, rows[:, :10].sort().values)


def test_no_queries_and_no_probes():
    queries, packed, bias, offsets, sizes, probes, _, k, most = _arguments()
    for q, p in ((0, 3), (4, 0)):
        few = queries[:q].contiguous(), packed, bias, offsets, sizes, probes[:q, :p].contiguous()
        scores, rows = torch.ops.torch_ivf_module.scan(*few, None, k, most)
        assert scores.shape == rows.shape == (q, k)
        assert (rows == -1).all()
        lims, rows = torch.ops.torch_ivf_module.scan_above(*few, scores[:, 0].contiguous())
        assert torch.equal(lims, torch.zeros(q + 1, dtype=torch.int64))
        assert rows.shape == (0,)
        coarse, segments = _index_arguments()
        settings = k, k, 1, 0, True, most
        found = torch.ops.torch_ivf_module.search_index(few[0], coarse, segments, None, few[-1], None, *settings)
        for part in found[1:3]:
            assert (part == -1).all()
            assert part.shape == (q, k)


@pytest.mark.parametrize("limits", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_torch_finds_nothing_wrong_with_the_operators(dtype, limits):
    arguments = _arguments(dtype, limits)
    ops = torch.ops.torch_ivf_module
    torch.library.opcheck(ops.scan.default, arguments)
    queries, probes, most = arguments[0], *arguments[5:7]
    coarse, segments = _index_arguments(dtype)
    torch.library.opcheck(ops.probe.default, (queries, coarse, 3, True, 1 << 20))
    settings = 5, 8, 3, 0, True, 1 << 20
    for given in ((None, None), (probes, most)):
        torch.library.opcheck(ops.search_index.default, (queries, coarse, segments, None, *given, *settings))
    torch.library.opcheck(ops.scan_above.default, (*arguments[:6], torch.zeros(len(queries))))
    torch.library.opcheck(ops.group_cells.default, (probes, torch.zeros(len(queries)).long(), list(_cells())))


def _cells(lists: int = 40, rows: int = 900) -> Cells:
    generator = torch.Generator().manual_seed(5)
    sizes = torch.bincount(torch.randint(lists, (rows,), generator=generator), minlength=lists)
    groups = torch.randint(-4, 5, (rows,), generator=generator)
    parts = [part.sort().values for part in groups.split(sizes.tolist())]
    return cells_of(torch.nn.functional.pad(sizes.cumsum(0), (1, 0)), torch.cat(parts))


@pytest.mark.parametrize(("queries", "probes"), [(0, 3), (1, 0), (1, 2), (3, 5), (200, 41)])
def test_cells_of_groups(queries, probes):
    cells, generator = _cells(), torch.Generator().manual_seed(queries)
    lists = InvertedLists(torch.zeros(900, 1), *[torch.zeros(1).long()] * 3, torch.zeros(0))
    probed = torch.rand(queries, 41, generator=generator).argsort(1)[:, :probes].contiguous()  # 40 is no list
    groups = torch.randint(-6, 7, (queries,), generator=generator)
    expected, at = cells_probed(cells, lists, probed, groups)
    found, moved = cells_probed(cells, lists, probed, groups, NativeKernel())
    assert torch.equal(found.sizes[moved], expected.sizes[at])
    filled = expected.sizes[at] > 0
    assert torch.equal(found.offsets[moved][filled], expected.offsets[at][filled])
    assert found.sizes[-1] == expected.sizes[-1] == 0
    assert found.sizes.shape[0] <= moved.unique().shape[0] + 1


def test_wrong_cells_are_named():
    cells, probed, groups = list(_cells()), torch.zeros(2, 3).long(), torch.zeros(2).long()
    for arguments, said in (
        ((probed[0], groups, cells), "probed must have 2"),
        ((probed, groups[1:], cells), "groups must have an entry"),
        ((probed, groups.int(), cells), "groups must be"),
        ((probed, groups, cells[1:]), "cells must be 4"),
        ((probed, groups, [*cells[:3], cells[3][1:]]), "equal length"),
        ((probed, groups, [cells[0].float(), *cells[1:]]), "cells must be"),
    ):
        with pytest.raises(RuntimeError, match=said):
            torch.ops.torch_ivf_module.group_cells(*arguments)


def test_wrong_arguments_are_named_and_so_is_what_lies_out_of_bounds():
    queries, packed, bias, offsets, sizes, probes, _, k, most = _arguments()
    scan = torch.ops.torch_ivf_module.scan
    for change, said in (
        ({0: queries[:, :-1].contiguous()}, "columns"),
        ({0: queries.double()}, "x must be"),
        ({0: queries.t()}, "dimensions|contiguous|columns"),
        ({2: bias[:-1]}, "bias"),
        ({5: probes[:-1]}, "probed"),
        ({6: probes[:-1]}, "limits"),
        ({7: 0}, "k must be"),
        ({1: packed.double()}, "packed must be"),
        ({0: queries[:, :0].contiguous(), 1: packed[:, :0].contiguous()}, "columns"),
        ({5: probes - 5}, "no list below 0"),
        ({3: offsets - 10}, "must lie in packed"),
        ({3: offsets + 1}, "must lie in packed"),
        ({4: sizes + (1 << 40)}, "must lie in packed"),
        ({4: -sizes - 1}, "must lie in packed"),
    ):
        arguments = [queries, packed, bias, offsets, sizes, probes, None, k, most]
        for place, value in change.items():
            arguments[place] = value
        with pytest.raises(RuntimeError, match=said):
            scan(*arguments)


def test_wrong_arguments_of_a_whole_search_are_named():
    queries, *_, probes, _, k, most = _arguments()
    coarse, segments = _index_arguments()
    centroids, bias, origin = coarse
    packed, offsets, ids, sizes, row_bias = segments
    good = {
        "x": queries,
        "coarse": coarse,
        "segments": segments,
        "codes": None,
        "probed": None,
        "limits": None,
        "k": k,
        "kept": k,
        "nprobe": 3,
        "max_codes": 0,
        "differences": True,
        "max_bytes": most,
    }
    search = torch.ops.torch_ivf_module.search_index
    search(**good)
    codes = list(torch.ops.torch_ivf_module.encode_lists(packed, offsets, sizes, packed.shape[1]))
    inner = torch.tensor([0, *[1] * (len(codes[2]) - 2), 0])
    for change, said in (
        ({"codes": codes[:4]}, "codes must be 5 tensors"),
        ({"codes": [*codes[:2], codes[2][1:], *codes[3:]]}, "codes must be those that encode_lists returns"),
        *(({"codes": [*codes[:2], codes[2] + far * inner, *codes[3:]]}, "codes must be") for far in (-(2**40), 2**40)),
        ({"x": queries[:1].expand(len(queries), -1)}, "x must be contiguous"),
        ({"kept": k - 1}, "kept must"),
        ({"k": 0, "kept": 0}, "k must"),
        ({"nprobe": 0}, "nprobe must"),
        ({"max_codes": -1}, "max_codes must"),
        ({"coarse": [centroids, bias]}, "coarse must"),
        ({"coarse": [centroids, bias, origin[1:]]}, "origin must"),
        ({"coarse": [centroids, bias, origin.double()]}, "origin must"),
        ({"coarse": [centroids[:, 1:].contiguous(), bias, origin]}, "centroids must"),
        ({"coarse": [centroids, bias[1:], origin]}, "bias must"),
        ({"coarse": [centroids[1:], bias[1:], origin]}, "a list for each centroid"),
        ({"segments": []}, "segments must"),
        ({"segments": segments[:4]}, "segments must"),
        ({"segments": segments * 3}, "segments must"),
        ({"segments": [*segments, packed.half(), *segments[1:]]}, "segments must have the same lists and dtype"),
        ({"segments": [packed, offsets, ids[1:], sizes, row_bias]}, "ids must"),
        ({"limits": probes}, "limits must come with probed"),
        ({"probed": probes - 5}, "no list below 0"),
        ({"probed": probes[1:]}, "probed must"),
        ({"segments": [packed, offsets - 10, ids, sizes, row_bias], "probed": probes}, "must lie in packed"),
    ):
        with pytest.raises(RuntimeError, match=said):
            search(**{**good, **change})


def test_lists_that_are_not_there_are_not_visited():
    queries, packed, bias, offsets, sizes, probes, _, k, most = _arguments()
    none = torch.full_like(probes, len(sizes) - 1)
    scores, rows = torch.ops.torch_ivf_module.scan(queries, packed, bias, offsets, sizes, none, None, k, most)
    assert (rows == -1).all()
    assert (scores == -math.inf).all()


# --- when it serves -----------------------------------------------------------------------------------------


def test_auto_takes_the_kernel_and_exact_never_does():
    index, _, queries = shared(problem("wide"), "l2", search_mode="auto")
    for settings, mode in (({}, "auto"), ({"profile": "exact"}, None), ({"profile": "approx_fast"}, "auto")):
        index.search(queries, 5, params=SearchParams(debug_stats=True, **settings))
        stats = index.last_search_stats
        assert (stats["mode"] == "native") == (mode == "auto"), settings
        assert (stats["certified"] > 0) == (mode == "auto")


def test_it_is_not_used_when_it_is_switched_off(monkeypatch):
    index, _, queries = shared(problem("wide"), "l2", search_mode="auto")
    expected = index.search(queries, 5)
    monkeypatch.setattr(native.library._library, "switched_off", True)  # as TORCH_IVF_NATIVE=0 does at the import
    assert not native.available()
    found = index.search(queries, 5, params=SearchParams(debug_stats=True))
    assert index.last_search_stats["mode"] in ("csr", "matrix")
    agree(found, expected)


@pytest.mark.parametrize("threads", [2, 5])
def test_answers_do_not_depend_on_the_number_of_threads(threads):
    before = torch.get_num_threads()
    index, _, queries = shared(problem("wide"), "l2", search_mode="auto")
    alone, _, question = flat(problem("wide"), "l2", search_mode="auto")
    try:
        torch.set_num_threads(1)
        expected = index.search(queries, 9), alone.search(question[:3], 9)
        torch.set_num_threads(threads)
        found = index.search(queries, 9), alone.search(question[:3], 9)
    finally:
        torch.set_num_threads(before)
    for one, other in zip(found, expected, strict=True):
        agree(one, other)
