"""Groups of rows: searches among the rows of a group, results with few rows of a group, and where groups are kept."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor

from tests.problems import each_metric, each_mode, few_training_rows
from torch_ivf_module import (
    IndexFlat,
    IndexIVFFlat,
    IndexIVFScalarQuantizer,
    IndexPreTransform,
    IndexScalarQuantizer,
    SearchParams,
    load,
)
from torch_ivf_module.dcp import IndexLoadPlanner

D, N, Q = 8, 900, 23
KINDS = ("flat", "ivf", "sq", "ivfsq")


def vectors(rows: int, seed: int) -> Tensor:
    """Vectors (rows, D) without ties."""
    return torch.randn(rows, D, generator=torch.Generator().manual_seed(seed))


def labels(rows: int = N) -> Tensor:
    """Groups (rows,) of very different sizes: half of the rows have one, some groups have one row, -1 is no group."""
    groups = torch.tensor([5, 5, 5, 5, 7, 7, -3, 2**62])[torch.arange(rows) % 8]
    groups[::50], groups[13] = -1, 1000
    return groups


def built(kind: str, metric: str = "l2", **settings: object) -> object:
    """A trained index without rows."""
    if kind in ("flat", "sq"):
        return IndexFlat(D, metric, **settings) if kind == "flat" else IndexScalarQuantizer(D, 8, metric, **settings)
    index = (IndexIVFFlat if kind == "ivf" else IndexIVFScalarQuantizer)(D, nlist=9, metric=metric, **settings)
    with few_training_rows():
        index.train(vectors(N, 0))
    index.nprobe = 9
    return index


def filled(kind: str = "ivf", metric: str = "l2", **settings: object) -> object:
    """An index with packed, pending and deleted rows, some of them without a group."""
    index, x, groups = built(kind, metric, **settings), vectors(N, 0), labels()
    index.add(x[:700], groups=groups[:700])
    index.list_sizes()  # packs
    index.add(x[700:850], groups=groups[700:850])
    index.add(x[850:])
    index.remove_ids(torch.arange(20, 60))
    return index


def stored_groups(index: object) -> dict[int, int]:
    """The group of each id that `filled` has."""
    groups = labels()
    groups[850:] = -1
    return {id: int(groups[id]) for id in range(N) if not 20 <= id < 60}


def brute_force(index: object, x: Tensor, k: int, allowed: list[list[int]]) -> tuple[Tensor, Tensor]:
    """`search` of each query alone by a selector of its allowed ids."""
    answers = [
        index.search(query[None], k, params=SearchParams(selector=torch.tensor(ids, dtype=torch.int64)))
        for query, ids in zip(x, allowed, strict=True)
    ]
    return torch.cat([d for d, _ in answers]), torch.cat([i for _, i in answers])


def wanted_groups() -> Tensor:
    """A group for each query: of all sizes, none, and unknown ones."""
    return torch.tensor([5, 7, -3, 2**62, 1000, -1, 6, 2**63 - 1, -(2**63)])[torch.arange(Q) % 9]


@each_metric
@each_mode
@pytest.mark.parametrize("kind", KINDS)
def test_groups_are_those_of_a_selector(kind, mode, metric):
    index, x, groups = filled(kind, metric, search_mode=mode), vectors(Q, 1), wanted_groups()
    known = stored_groups(index)
    allowed = [[id for id, group in known.items() if group == wanted] for wanted in groups.tolist()]
    for probes in (1, 3, 9):
        params = {} if kind in ("flat", "sq") else {"nprobe": probes}
        if params:
            index.nprobe = probes
        expected = brute_force(index, x, 10, allowed)
        for profile in ("speed", "exact"):
            d, i = index.search(x, 10, params=SearchParams(groups=groups, profile=profile, **params))
            assert torch.equal(i, expected[1])
            torch.testing.assert_close(d, expected[0])


@each_metric
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("most", [1, 2, 5])
def test_group_by_is_greedy_over_all_rows(kind, metric, most):
    index, x = filled(kind, metric), vectors(Q, 1)
    known, k = stored_groups(index), 12
    every = index.search(x, index.ntotal)[1]
    d, i = index.search(x, k, params=SearchParams(group_by=most))
    for query in range(Q):
        assert i[query].tolist() == greedy(every[query].tolist(), known, most, k)
    assert torch.equal(d.isinf(), i == -1)


def test_group_by_of_few_results_is_padded():
    index = IndexFlat(D)
    index.add(vectors(30, 0), groups=torch.arange(30) % 3)
    d, i = index.search(vectors(4, 1), 10, params=SearchParams(group_by=2))
    assert ((i >= 0).sum(1) == 6).all()
    assert torch.equal(d.isinf(), i == -1)
    assert (i[:, 6:] == -1).all()


def test_group_by_with_groups_returns_that_many():
    index, groups = filled(), torch.full((Q,), 5)
    i = index.search(vectors(Q, 1), 10, params=SearchParams(group_by=2, groups=groups))[1]
    expected = index.search(vectors(Q, 1), 2, params=SearchParams(groups=groups))[1]
    assert torch.equal(i[:, :2], expected)
    assert (i[:, 2:] == -1).all()


@pytest.mark.parametrize("kind", KINDS)
def test_groups_in_range_search(kind):
    index, x, groups = filled(kind), vectors(Q, 1), wanted_groups()
    known, radius = stored_groups(index), 9.0
    lims, d, i = index.range_search(x, radius, params=SearchParams(groups=groups))
    for query in range(Q):
        ids = torch.tensor([id for id, group in known.items() if group == groups[query]], dtype=torch.int64)
        own = index.range_search(x[query : query + 1], radius, params=SearchParams(selector=ids))
        part = slice(int(lims[query]), int(lims[query + 1]))
        assert sorted(i[part].tolist()) == sorted(own[2].tolist())
        torch.testing.assert_close(d[part].sort().values, own[1].sort().values)


def test_groups_with_a_selector():
    index, x, even = filled(), vectors(Q, 1), torch.arange(0, N, 2)
    groups = wanted_groups()
    known = stored_groups(index)
    allowed = [[id for id in range(0, N, 2) if known.get(id) == group] for group in groups.tolist()]
    i = index.search(x, 10, params=SearchParams(groups=groups, selector=even))[1]
    assert torch.equal(i, brute_force(index, x, 10, allowed)[1])


def filters_of(kind: str, generator: torch.Generator) -> tuple[dict[str, object], list[set[int]]]:
    """Settings that let each query find some ids alone, and these ids."""
    masks = torch.rand(Q, N, generator=generator) < 0.4
    every = [set(torch.nonzero(row)[:, 0].tolist()) for row in masks]
    if kind == "masks":
        return {"selector": masks}, every
    if kind == "lists":
        return {"selector": [torch.nonzero(row)[:, 0] for row in masks]}, every
    excluded = torch.randint(-1, N, (Q, 200), generator=generator)
    left = [set(range(N)) - set(row.tolist()) for row in excluded]
    if kind == "exclude":
        return {"exclude": excluded}, left
    return {"exclude": excluded, "selector": masks}, [a & b for a, b in zip(every, left, strict=True)]


@each_mode
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("filters", ["masks", "lists", "exclude", "both"])
def test_groups_with_a_filter_of_each_query(kind, filters, mode):
    index, x, groups = filled(kind, search_mode=mode), vectors(Q, 1), wanted_groups()
    settings, passing = filters_of(filters, torch.Generator().manual_seed(3))
    known = stored_groups(index)
    of_groups = [{id for id, group in known.items() if group == wanted} for wanted in groups.tolist()]
    allowed = [sorted(a & b) for a, b in zip(of_groups, passing, strict=True)]
    expected = brute_force(index, x, 10, allowed)
    d, i = index.search(x, 10, params=SearchParams(groups=groups, **settings))
    assert torch.equal(i, expected[1])
    torch.testing.assert_close(d, expected[0])
    lims, _, i = index.range_search(x, 9.0, params=SearchParams(groups=groups, **settings))
    for query, ids in enumerate(allowed):
        own = index.range_search(x[query : query + 1], 9.0, params=SearchParams(selector=torch.tensor(ids).long()))
        assert sorted(i[lims[query] : lims[query + 1]].tolist()) == sorted(own[2].tolist())


@pytest.mark.parametrize("filters", ["masks", "lists", "exclude", "both"])
def test_group_by_with_a_filter_of_each_query(filters):
    index, x, k = filled(), vectors(Q, 1), 12
    settings, passing = filters_of(filters, torch.Generator().manual_seed(4))
    every, known = index.search(x, index.ntotal)[1], stored_groups(index)
    i = index.search(x, k, params=SearchParams(group_by=2, **settings))[1]
    for query in range(Q):
        expected = greedy([id for id in every[query].tolist() if id in passing[query]], known, 2, k)
        assert i[query].tolist() == expected


def greedy(ids: list[int], known: dict[int, int], most: int, k: int) -> list[int]:
    """The first k ids of which at most `most` have one group, -1 for those that are missing."""
    counts, found = dict.fromkeys([*known.values(), -1], 0), []
    for id in ids:
        counts[known[id]] += 1
        if known[id] == -1 or counts[known[id]] <= most:
            found.append(id)
    return (found + [-1] * k)[:k]


def test_vmap_repeats_groups_for_each_entry_of_the_batch():
    index, groups = filled(), wanted_groups()
    x = vectors(3 * Q, 1).view(3, Q, D)
    params = SearchParams(groups=groups, exclude=torch.arange(60, 60 + Q)[:, None])
    expected = torch.stack([index.search(part, 5, params=params)[1] for part in x])
    assert torch.equal(torch.func.vmap(lambda part: index.search(part, 5, params=params)[1])(x), expected)


def test_stats_count_all_segments():
    index = filled()
    index.add(vectors(5, 8), groups=torch.full((5,), 5))  # pending
    params = SearchParams(groups=torch.tensor([5]), debug_stats=True)
    index.search(vectors(1, 1), 3, params=params)
    groups, sizes = index.group_sizes()
    assert index.last_search_stats["rows_read"] >= int(sizes[groups == 5])
    assert index.last_search_stats["queries"] == 1


def test_max_codes_counts_the_rows_of_all_groups():
    index, x = filled(), vectors(Q, 1)
    known, limit = stored_groups(index), 250
    i = index.search(x, index.ntotal, params=SearchParams(max_codes=limit))[1]
    allowed = [[id for id in row.tolist() if id >= 0 and known[id] == 5] for row in i]
    found = index.search(x, 10, params=SearchParams(max_codes=limit, groups=torch.full((Q,), 5)))[1]
    assert found.tolist() == [(ids + [-1] * 10)[:10] for ids in allowed]


def test_groups_have_vectors_and_gradients():
    index, groups = filled(), torch.full((Q,), 7)
    x = vectors(Q, 1).requires_grad_()
    d, i, r = index.search_and_reconstruct(x, 5, params=SearchParams(groups=groups))
    d.sum().backward()
    torch.testing.assert_close(r, index.reconstruct_batch(i.flatten()).view(Q, 5, D))
    torch.testing.assert_close(x.grad, 2 * (x.detach()[:, None] - r).sum(1))
    assert (index.groups_of(i.flatten()) == 7).all()


def test_queries_that_are_not_finite_find_nothing():
    index, x = filled(), vectors(3, 1)
    x[1, 2] = torch.nan
    i = index.search(x, 4, params=SearchParams(groups=torch.full((3,), 5)))[1]
    assert (i[1] == -1).all()
    assert (i[[0, 2]] >= 0).all()


def test_a_search_reads_rows_of_its_group_alone():
    index = filled()
    for group, rows in zip(*map(Tensor.tolist, index.group_sizes()), strict=True):
        index.search(vectors(1, 1), 3, params=SearchParams(groups=torch.tensor([group]), debug_stats=True))
        assert index.last_search_stats["rows_read"] == rows


def test_an_index_without_groups_keeps_its_state():
    index = built("ivf")
    names = list(index.state_dict())
    index.add(vectors(50, 0))
    assert list(index.state_dict()) == names
    assert "list_groups" not in names
    x, none = vectors(Q, 1), torch.full((Q,), -1)
    assert torch.equal(index.search(x, 5, params=SearchParams(groups=none))[1], index.search(x, 5)[1])
    assert (index.search(x, 5, params=SearchParams(groups=none + 1))[1] == -1).all()


def same_groups(index: object, offset: int = 0) -> bool:
    """Whether an index has the groups of `filled`."""
    known = stored_groups(index)
    found = index.groups_of(torch.tensor(list(known)) + offset)
    return found.tolist() == list(known.values())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
@pytest.mark.parametrize("mmap", [False, True])
def test_files_keep_groups(kind, suffix, mmap, tmp_path):
    index = filled(kind)
    index.save(tmp_path / f"index{suffix}")
    loaded = load(tmp_path / f"index{suffix}", mmap=mmap)
    assert same_groups(loaded)
    x, params = vectors(Q, 1), SearchParams(groups=wanted_groups(), nprobe=9 if "ivf" in kind else None)
    assert torch.equal(loaded.search(x, 5, params=params)[1], index.search(x, 5, params=params)[1])


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_distributed_checkpoints_keep_groups(tmp_path):
    dcp = pytest.importorskip("torch.distributed.checkpoint")
    index, fresh, other = filled(), built("ivf"), filled()
    dcp.save({"index": index}, checkpoint_id=tmp_path / "a", no_dist=True)
    dcp.load({"index": fresh}, checkpoint_id=tmp_path / "a", planner=IndexLoadPlanner(), no_dist=True)
    assert same_groups(fresh)
    plain = built("ivf")
    plain.add(vectors(40, 0))
    dcp.save({"index": plain}, checkpoint_id=tmp_path / "b", no_dist=True)
    dcp.load({"index": other}, checkpoint_id=tmp_path / "b", planner=IndexLoadPlanner(), no_dist=True)
    assert other.ntotal == 40
    assert "list_groups" not in other.state_dict()


@pytest.mark.parametrize("kind", KINDS)
def test_changes_keep_groups(kind):
    index = filled(kind)
    assert same_groups(copy.deepcopy(index))
    other = built(kind)
    other.load_state_dict(index.state_dict())
    assert same_groups(other)
    part = index.copy_subset(torch.arange(100, 140))
    assert torch.equal(part.groups_of(torch.arange(100, 140)), labels()[100:140])
    if "ivf" in kind:
        moved = copy.deepcopy(index)
        moved.retrain(vectors(N, 3))
        assert same_groups(moved)
    empty = copy.deepcopy(index)
    empty.reset()
    assert "list_groups" not in empty.state_dict()
    empty.merge_from(other, 5000)
    assert same_groups(empty, 5000)
    empty.check_buffers()


@pytest.mark.parametrize("kind", ["ivf", "ivfsq"])
def test_rows_that_are_rebalanced_keep_their_groups(kind):
    """Where few rows move, so that cells of packed rows are kept, and after packing."""
    index, x, known, wanted = filled(kind), vectors(Q, 1), stored_groups(filled(kind)), wanted_groups()
    allowed = [[id for id, group in known.items() if group == one] for one in wanted.tolist()]
    params = SearchParams(groups=wanted)
    expected = index.search(x, 5, params=params)
    for max_rows in (150, 1000):
        assert index.rebalance(max_rows=max_rows).moved
        for packs in (False, True):
            if packs:
                index.list_sizes()
            assert torch.equal(index.search(x, 5, params=params)[1], expected[1])
            assert same_groups(index)
            assert torch.equal(brute_force(index, x, 5, allowed)[1], expected[1])


def test_update_keeps_the_group_unless_one_is_given():
    index, ids = filled(), torch.tensor([3, 710, 13])
    before = index.groups_of(ids)
    index.update(ids, vectors(3, 5))
    assert torch.equal(index.groups_of(ids), before)
    index.update(ids, vectors(3, 6), groups=torch.tensor([1, 2, -1]))
    assert index.groups_of(ids).tolist() == [1, 2, -1]
    index.list_sizes()
    assert index.groups_of(ids).tolist() == [1, 2, -1]


def test_group_sizes_count_rows():
    index = filled()
    groups, sizes = index.group_sizes()
    counts = torch.tensor(list(stored_groups(index).values())).unique(return_counts=True)
    assert torch.equal(groups, counts[0])
    assert torch.equal(sizes, counts[1])


def test_transformed_index_has_groups():
    index = IndexPreTransform(D, torch.nn.Linear(D, 4).requires_grad_(False), IndexFlat(4))
    index.add(vectors(20, 0), groups=torch.arange(20) % 4)
    i = index.search(vectors(2, 1), 3, params=SearchParams(groups=torch.tensor([1, 2])))[1]
    assert (index.groups_of(i.flatten()).view(2, 3) == torch.tensor([[1], [2]])).all()


def test_compiled_search_has_groups():
    index, x, groups = filled(), vectors(Q, 1), wanted_groups()

    @torch.compile(backend="eager", fullgraph=True)
    def search(x: Tensor, groups: Tensor) -> tuple[Tensor, Tensor]:
        return index.search(x, 5, params=SearchParams(groups=groups))

    assert torch.equal(search(x, groups)[1], index.search(x, 5, params=SearchParams(groups=groups))[1])


@pytest.mark.parametrize(
    ("groups", "error", "text"),
    [
        (torch.zeros(4), TypeError, "groups must be int64"),
        (torch.zeros(5, dtype=torch.int64), ValueError, "one group for each of the 4 rows"),
        (torch.zeros(4, 1, dtype=torch.int64), ValueError, "groups must have shape"),
        (torch.zeros(4, dtype=torch.bool), TypeError, "groups must be int64"),
        ([2**63] * 4, ValueError, "groups"),
        ("abcd", TypeError, "groups"),
    ],
)
def test_wrong_groups_change_nothing(groups, error, text):
    index, x = filled(), vectors(4, 1)
    before = {name: tensor.clone() for name, tensor in index.state_dict().items()}
    calls = [
        lambda: index.add(x, groups=groups),
        lambda: index.add_with_ids(x, torch.arange(4), groups=groups),
        lambda: index.update(torch.arange(4), x, groups=groups),
    ]
    for call in calls:
        with pytest.raises(error, match=text):
            call()
    after = index.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_wrong_settings_are_refused():
    index, x = filled(), vectors(4, 1)
    groups = torch.zeros(4, dtype=torch.int64)
    with pytest.raises(ValueError, match="one group for each of the 4 queries"):
        index.search(x, 3, params=SearchParams(groups=groups[:3]))
    with pytest.raises(ValueError, match="budget"):
        index.search(x, 3, params=SearchParams(groups=groups, candidate_budget=100))
    with pytest.raises(ValueError, match="group_by must be >= 1"):
        SearchParams(group_by=0)
    with pytest.raises(ValueError, match="range_search has no group_by"):
        index.range_search(x, 1.0, params=SearchParams(group_by=1))
    with pytest.raises(RuntimeError, match="without groups"):
        index.rebuild_lists()
    with pytest.raises(KeyError, match="id 25"):
        index.groups_of(torch.tensor([25]))


def test_states_with_wrong_groups_are_refused():
    index = filled()
    state = index.state_dict()
    for groups in (state["list_groups"].flip(0), state["list_groups"][1:], state["list_groups"].float()):
        with pytest.raises(RuntimeError, match="list_groups"):
            index.load_state_dict({**state, "list_groups": groups})
    assert same_groups(index)


def test_groups_written_by_other_code_are_noticed():
    index = filled()
    index.list_groups += 1
    with pytest.raises(RuntimeError, match="changed in place"):
        index.search(vectors(2, 1), 3)
