"""Searches of an index, compared with its model.

Q queries, N rows, d dim, k results.
"""

from __future__ import annotations

from collections import defaultdict
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tests.fuzz.filters import passing
from tests.fuzz.model import Model
from tests.oracle import PRODUCT_ROUNDING, RTOL, SMALLEST, check, check_range, comparable, decoded, scores_of
from torch_ivf_module import SearchParams

# A graph ranks by scores rounded to float32, so of two rows whose scores differ by less than this part of the squared
# norms it may return either.
GRAPH_ROUNDING = 1e-5


class Query(NamedTuple):
    """One call of a search."""

    x: Tensor  # (Q, d)
    k: int
    nprobe: int
    max_codes: int | None = None
    profile: str = "speed"
    selector: Tensor | tuple[Tensor, ...] | None = None
    exclude: Tensor | None = None  # (Q, m)
    groups: Tensor | None = None  # (Q,)
    group_by: int | None = None

    def params(self, **more: Any) -> SearchParams:
        own = {name: value for name, value in self._asdict().items() if name not in ("x", "k")}
        return SearchParams(**own, **more)

    def passing(self, model: Model) -> Tensor:
        """The rows that each query may find, bool (Q, N)."""
        found = passing(model.ids, len(self.x), self.selector, self.exclude)
        return found if self.groups is None else found & (model.groups == self.groups[:, None])


def check_search(index: Any, model: Model, query: Query) -> None:
    reach = model.reach(query.x, query.nprobe, query.max_codes, query.passing(model))
    if query.profile.startswith("approx_"):  # which leaves rows out
        reach = reach._replace(required=torch.zeros_like(reach.required))
    found = index.search(query.x, query.k, params=query.params(debug_stats=True))
    check(found, query.x, model.rows, model.metric, query.k, reach)
    assert index.last_search_stats["queries"] == len(query.x)


def check_group_by(index: Any, model: Model, query: Query) -> None:
    """Of all rows in the order of their distances: the k first of which no group has too many. For ids without repeats,
    where they tell the group."""
    assert query.group_by is not None
    x, most = query.x, query.group_by
    every = query._replace(k=max(1, model.n), group_by=None)
    check_search(index, model, every)
    D, I = index.search(x, query.k, params=query.params())
    E, J = index.search(x, every.k, params=every.params())
    slack = [SMALLEST] * len(x)
    if model.metric != "l2" and model.n:
        sizes = comparable(x, model.metric).norm(dim=1) * model.stored.double().norm(dim=1).amax()
        slack = (SMALLEST + 2 * PRODUCT_ROUNDING * sizes).nan_to_num(0, 0).tolist()
    ids, order = model.ids.sort()
    worst = torch.inf if model.metric == "l2" else -torch.inf
    for q in range(len(x)):
        groups = [int(model.groups[order[torch.searchsorted(ids, id)]]) if id != -1 else -1 for id in J[q]]
        kept = [group == -1 or groups[:at].count(group) < most for at, group in enumerate(groups)]
        expected = torch.cat([E[q][torch.tensor(kept, dtype=torch.bool)], torch.full((query.k,), worst)])[: query.k]
        torch.testing.assert_close(D[q], expected, rtol=2 * RTOL, atol=slack[q])
        found = {int(id): int(model.groups[order[torch.searchsorted(ids, id)]]) for id in I[q] if id != -1}
        assert len(found) == int((I[q] != -1).sum()), "an id was returned twice"
        assert set(found) <= set(J[q].tolist()), "an id that does not pass, or is in no list that was probed"
        for group in set(found.values()) - {-1}:
            assert list(found.values()).count(group) <= most, f"query {q}: too many results of group {group}"


def check_search_and_reconstruct(index: Any, model: Model, query: Query) -> None:
    reach = model.reach(query.x, query.nprobe)
    D, I, R = index.search_and_reconstruct(query.x, query.k, params=SearchParams(nprobe=query.nprobe))
    check((D, I), query.x, model.rows, model.metric, query.k, reach)
    assert R.dtype == model.dtype
    assert R.shape == (*I.shape, model.d)
    assert R[I == -1].isnan().all()
    for id, row in zip(I[I != -1].tolist(), R[I != -1], strict=True):
        assert (model.stored[model.ids == id] == row).all(1).any(), f"id {id} has the vector of another id"


def check_range_search(index: Any, model: Model, query: Query, pick: int, factor: float) -> None:
    """A radius that is `factor` times the distance of one query from one row."""
    scores = scores_of(comparable(query.x, model.metric), model.stored.double(), model.metric).abs().flatten()
    scores = scores[scores.isfinite()]
    radius = float(torch.tensor(factor * float(scores[pick % len(scores)]) if len(scores) else factor))
    reach = model.reach(query.x, query.nprobe, selected=query.passing(model))
    found = index.range_search(query.x, radius, params=query.params())
    check_range(found, query.x, model.rows, model.metric, radius, reach)


def check_reconstruct(index: Any, model: Model, pick: int) -> None:
    if model.n:
        id = int(model.ids[pick % model.n])
        found = index.reconstruct(id)
        assert found.dtype == model.dtype
        assert (model.rows_of(id) == found).all(1).any(), f"reconstruct({id}) is not the vector added last"
    unknown = int(model.ids.clamp(0, 2**40).max()) + 1 if model.n else 0
    if not (model.ids == unknown).any():
        try:
            index.reconstruct(unknown)
        except KeyError:
            return
        raise AssertionError(f"reconstruct({unknown}) of an unknown id")


def check_graph(index: Any, model: Model, query: Query, layout: str) -> None:
    graph = index.graph(query.k, query.nprobe, max_codes=query.max_codes, layout=layout)
    reach = model.reach(query.x, query.nprobe, query.max_codes)
    x, stored = comparable(query.x, model.metric), model.stored.double()
    size = (x.square().sum(1) + (stored.square().sum(1).max() if model.n else 0))[:, None]
    found = graph(query.x)
    check(found, query.x, model.rows, model.metric, query.k, reach, slack=GRAPH_ROUNDING * size.nan_to_num(0))
    for batched, expected in zip(graph(query.x[:, None]), found, strict=True):
        assert torch.equal(batched[:, 0], expected)


def check_state(index: Any, model: Model) -> None:
    """Assert that the buffers have the rows of the model, each in the list of its nearest centroid."""
    state = index.state_dict()
    rows, lists = _stored(state, model)
    expected = _rows(model.ids, model.groups, model.stored)
    assert sorted(rows) == sorted(expected)
    if model.centroids is None:
        return
    assert torch.equal(state["centroids"], model.centroids)
    # The lists that each row may be in. Equal rows may be in the lists of any of them.
    may = model.in_lists()
    where: dict[Row, Tensor] = {}
    for row, one in zip(expected, may, strict=True):
        where[row] = where.get(row, torch.zeros_like(one)) | one
    for row, number in zip(rows, lists, strict=True):
        assert where[row][number], f"id {row[0]} is in list {number}, which is not its nearest"


def lists_of(index: Any, model: Model) -> Tensor:
    """The list of each row of the model (N,), as the index has it."""
    places = defaultdict(list)
    for row, number in zip(*_stored(index.state_dict(), model), strict=True):
        places[row].append(number)
    return torch.tensor([places[row].pop() for row in _rows(model.ids, model.groups, model.stored)], dtype=torch.int64)


def _stored(state: dict[str, Tensor], model: Model) -> tuple[list[Row], list[int]]:
    """The rows in the buffers of an index, and their lists."""
    offsets, ids = state["list_offsets"], state["list_ids"]
    packed = state["packed_embeddings"] if model.bits is None else decoded(state["packed_codes"], model.d).float()
    assert int(offsets[-1]) == len(ids) == len(packed) == model.n
    assert (offsets.diff() >= 0).all()
    lists = torch.repeat_interleave(torch.arange(len(offsets) - 1), offsets.diff())
    return _rows(ids, state.get("list_groups", torch.full_like(ids, -1)), packed), lists.tolist()


Row = tuple[int, int, bytes]


def _rows(ids: Tensor, groups: Tensor, vectors: Tensor) -> list[Row]:
    """Each row as its id, its group and the bytes of its vector, -0 as 0."""
    content = (row.tobytes() for row in (vectors.float() + 0).numpy())
    return list(zip(ids.tolist(), groups.tolist(), content, strict=True))
