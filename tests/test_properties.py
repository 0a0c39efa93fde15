"""Random sequences of changes and searches, against a list of (id, vector); and invariants of packing."""

from __future__ import annotations

import pickle
from copy import deepcopy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from tests.datasets import lattice
from tests.oracle import StoredRows, check, check_range, probed
from tests.problems import few_training_rows
from tests.states import same_state, snapshot
from torch_ivf_module import IndexFlatL2, IndexIVFFlat
from torch_ivf_module.functional import lists as ragged
from torch_ivf_module.functional import select_topk

D = 4
NLIST = 5
SIZES = st.integers(0, 12)
SEEDS = st.integers(0, 2**20)
IDS = st.one_of(st.integers(-5, 40), st.sampled_from([2**40, -(2**63), 2**62])).filter(lambda id: id != -1)


class Bookkeeping(RuleBasedStateMachine):
    """An index beside a list of (id, vector); whole numbers, so that distances are exact and ties common."""

    def make(self):
        raise NotImplementedError

    @initialize()
    def start(self):
        self.index = self.make()
        self.rows: list[tuple[int, torch.Tensor]] = []
        self.next_id = 0

    def vectors(self, size, seed):
        return lattice(size, D, seed=seed, reach=4)

    @rule(size=SIZES, seed=SEEDS)
    def add(self, size, seed):
        x = self.vectors(size, seed)
        self.index.add(x)
        self.rows += zip(range(self.next_id, self.next_id + size), x, strict=True)
        self.next_id += size

    @rule(ids=st.lists(IDS, max_size=8), seed=SEEDS)
    def add_with_ids(self, ids, seed):
        x = self.vectors(len(ids), seed)
        self.index.add_with_ids(x, torch.tensor(ids, dtype=torch.int64))
        self.rows += zip(ids, x, strict=True)
        self.next_id = max([self.next_id, *(id + 1 for id in ids)])

    @rule(ids=st.lists(IDS, max_size=8))
    def remove(self, ids):
        kept = [(id, x) for id, x in self.rows if id not in ids]
        assert self.index.remove_ids(torch.tensor(ids, dtype=torch.int64)) == len(self.rows) - len(kept)
        self.rows = kept

    @rule(mask=st.lists(st.booleans(), max_size=30))
    def remove_by_mask(self, mask):
        kept = [(id, x) for id, x in self.rows if not (0 <= id < len(mask) and mask[id])]
        assert self.index.remove_ids(torch.tensor(mask, dtype=torch.bool)) == len(self.rows) - len(kept)
        self.rows = kept

    @rule(picks=st.lists(st.integers(0, 10**6), max_size=4), seed=SEEDS)
    def update(self, picks, seed):
        held = [id for id, _ in self.rows]
        ids = list({held[pick % len(held)] for pick in picks if held})
        ids = [id for id in ids if held.count(id) == 1]
        x = self.vectors(len(ids), seed)
        self.index.update(torch.tensor(ids, dtype=torch.int64), x)
        new = dict(zip(ids, x, strict=True))
        self.rows = [(id, new.get(id, old)) for id, old in self.rows]

    @rule()
    def reset(self):
        self.index.reset()
        self.rows, self.next_id = [], 0

    @rule(seed=SEEDS)
    def fail_to_add(self, seed):
        x = self.vectors(3, seed)
        x[1, 2] = torch.nan
        with pytest.raises(ValueError, match="1"):
            self.index.add(x)
        with pytest.raises(ValueError, match="ids"):
            self.index.add_with_ids(x[:1], torch.tensor([-1]))

    @rule(how=st.sampled_from(["deepcopy", "pickle", "state_dict"]))
    def replace_by_a_copy(self, how):
        if how == "deepcopy":
            self.index = deepcopy(self.index)
        elif how == "pickle":
            self.index = pickle.loads(pickle.dumps(self.index))
        else:
            other = self.make()
            other.load_state_dict(self.index.state_dict())
            self.index, self.in_order = other, False

    @rule(how=st.sampled_from(["half", "bfloat16", "float", "double", "to", "cpu", "share_memory"]))
    def convert(self, how):
        """Whole numbers below 256 are the same in every storage dtype."""
        expected = {"half": torch.float16, "bfloat16": torch.bfloat16, "float": torch.float32, "to": torch.float16}
        dtype = expected.get(how, self.index.dtype)
        self.index.to(dtype) if how == "to" else getattr(self.index, how)()
        assert self.index.dtype == dtype

    @rule(size=SIZES, seed=SEEDS, number=st.booleans())
    def add_and_remove_again(self, size, seed, number):
        """Rows that are removed while they are pending, so that none is."""
        if number:
            first = self.next_id
            self.add(size, seed)
            ids = list(range(first, first + size))
        else:
            ids = list(range(900, 900 + size))
            self.add_with_ids(ids, seed)
        self.remove(ids)

    @rule(strict=st.booleans())
    def load_own_state(self, strict):
        self.index.load_state_dict(self.index.state_dict(), strict=strict)
        self.in_order = False

    @rule()
    def reset_parameters(self):
        other = self.make()
        other.add(self.vectors(3, 0))
        other.reset_parameters()
        assert (other.ntotal, int(other.next_id), other.is_trained) == (0, 0, isinstance(other, IndexFlatL2))
        other.load_state_dict(self.index.state_dict(), assign=True)
        self.index, self.in_order = other, False

    def held(self):
        ids = torch.tensor([id for id, _ in self.rows], dtype=torch.int64)
        vectors = torch.stack([x for _, x in self.rows]) if self.rows else torch.zeros(0, D)
        lists = torch.zeros(len(ids), dtype=torch.int64)
        return StoredRows(ids, vectors.double(), lists)

    @rule(
        seed=SEEDS,
        k=st.integers(1, 30),
        mode=st.sampled_from(["auto", "csr", "matrix"]),
        size=st.integers(0, 6),
    )
    def search(self, seed, k, mode, size):
        self.index.search_mode = mode
        queries = lattice(size, D, seed=seed, reach=5) + 0.5
        held = self.held()
        check(self.index.search(queries, k), queries, held, "l2", k)
        radius = float(seed % 40)
        check_range(self.index.range_search(queries, radius), queries, held, "l2", radius)

    @rule(pick=st.integers(0, 10**6))
    def reconstruct(self, pick):
        if self.rows:
            id = self.rows[pick % len(self.rows)][0]
            last = next(x for other, x in reversed(self.rows) if other == id)
            count = sum(other == id for other, _ in self.rows)
            found = self.index.reconstruct(id)
            assert found.dtype == self.index.dtype
            found = found.float()
            if count == 1 or self.in_order:
                assert torch.equal(found, last)
            else:
                assert any(torch.equal(found, x) for other, x in self.rows if other == id)
        with pytest.raises(KeyError):
            self.index.reconstruct(999_999)

    in_order = True  # whether the row added last of a duplicate id comes back, which a state_dict does not keep

    @invariant()
    def counts(self):
        if hasattr(self, "index"):
            assert self.index.ntotal == len(self.rows)
            assert int(self.index.next_id) == self.next_id

    @rule()
    def state(self):
        state = self.index.state_dict()
        sizes = state["list_offsets"].diff()
        assert int(state["list_offsets"][0]) == 0
        assert int(state["list_offsets"][-1]) == len(state["list_ids"]) == len(self.rows)
        assert (sizes >= 0).all()
        stored = sorted(zip(state["list_ids"].tolist(), state["packed_embeddings"].tolist(), strict=True))
        assert stored == sorted((id, x.tolist()) for id, x in self.rows)
        if isinstance(self.index, IndexIVFFlat) and self.rows:
            lists = torch.repeat_interleave(torch.arange(len(sizes)), sizes)
            nearest = probed(self.index, state["packed_embeddings"].float(), nprobe=1).allowed
            assert nearest[torch.arange(len(lists)), lists].all()


class InvertedFile(Bookkeeping):
    def make(self):
        index = IndexIVFFlat(D, nlist=NLIST, nprobe=NLIST)
        with few_training_rows():
            index.train(lattice(60, D, seed=9, reach=4), niter=2)
        return index


class Flat(Bookkeeping):
    def make(self):
        return IndexFlatL2(D)


STEPS = settings(max_examples=25, stateful_step_count=20)
TestInvertedFile = InvertedFile.TestCase
TestInvertedFile.settings = STEPS
TestFlat = Flat.TestCase
TestFlat.settings = STEPS


# --- packing and selecting ----------------------------------------------------------------------------------


@given(
    first=st.lists(st.integers(0, NLIST - 1), max_size=30),
    second=st.lists(st.integers(0, NLIST - 1), max_size=30),
)
def test_append_equals_pack(first, second):
    assigned = torch.tensor([*first, *second], dtype=torch.int64)
    ids = torch.arange(100, 100 + len(assigned))
    x = torch.arange(2.0 * len(assigned)).view(-1, 2)
    whole = ragged.pack(x, ids, assigned, NLIST)
    split = len(first)
    packed, offsets, kept = ragged.pack(x[:split], ids[:split], assigned[:split], NLIST)
    both = ragged.append(packed, offsets, kept, x[split:], ids[split:], assigned[split:])
    for one, other in zip(both, whole, strict=True):
        assert torch.equal(one, other)
    packed, offsets, kept = whole
    assert offsets.shape == (NLIST + 1,)
    sizes = ragged.lengths(offsets)
    assert torch.equal(sizes, torch.bincount(assigned, minlength=NLIST))
    assert torch.equal(packed, x[kept - 100])
    # Each list holds what was assigned to it, in the order it came in.
    lists = torch.repeat_interleave(torch.arange(NLIST), sizes)
    assert torch.equal(assigned[kept - 100], lists)
    for number in range(NLIST):
        assert (kept[lists == number].diff() > 0).all()


@given(
    rows=st.integers(0, 4),
    width=st.integers(0, 40),
    k=st.integers(1, 12),
    seed=SEEDS,
    spoil=st.floats(0, 1),
)
def test_select_topk(rows, width, k, seed, spoil):
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randint(-4, 5, (rows, width), generator=generator).float()
    labels = torch.randint(0, 10**6, (rows, width), generator=generator)
    bad = torch.rand(rows, width, generator=generator) < spoil
    kinds = torch.tensor([torch.nan, torch.inf, -torch.inf, 3.0])
    kind = torch.randint(0, 4, (rows, width), generator=generator)
    scores = torch.where(bad, kinds[kind], scores)
    labels = labels.masked_fill(bad & (kind == 3), -1)
    best, found = select_topk(scores.clone(), labels.clone(), k)
    assert best.shape == found.shape == (rows, k)
    assert torch.equal(found == -1, best == -torch.inf)
    for q in range(rows):
        usable = [
            (score, label)
            for score, label in zip(scores[q].tolist(), labels[q].tolist(), strict=True)
            if label >= 0 and abs(score) < torch.inf
        ]
        expected = sorted((score for score, _ in usable), reverse=True)[:k]
        assert best[q].tolist() == expected + [-torch.inf] * (k - len(expected))
        for pair in zip(best[q].tolist(), found[q].tolist(), strict=True):
            if pair[1] != -1:
                usable.remove(pair)  # every pair is one of the input, and no more often than it was there


@given(
    width=st.integers(200, 3000),
    k=st.integers(1, 30),
    parts=st.integers(1, 5),
    seed=SEEDS,
)
def test_merge_equals_selection_among_all(width, k, parts, seed):
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randn(3, width, generator=generator)
    labels = torch.arange(width).expand(3, -1)
    whole = select_topk(scores, labels, k)
    expected = scores.topk(k, dim=1)
    assert torch.equal(whole[0], expected.values)
    assert torch.equal(whole[1], expected.indices)
    found = [select_topk(s, l, k) for s, l in zip(scores.chunk(parts, 1), labels.chunk(parts, 1), strict=True)]
    merged = select_topk(torch.cat([f[0] for f in found], 1), torch.cat([f[1] for f in found], 1), k)
    assert torch.equal(merged[0], whole[0])
    assert torch.equal(merged[1], whole[1])


@given(
    ranges=st.lists(st.lists(st.integers(0, 5), min_size=3, max_size=3), min_size=1, max_size=4),
    extra=st.integers(0, 6),
)
def test_ranges_to_positions(ranges, extra):
    sizes = torch.tensor(ranges)
    starts = torch.tensor([[100, 7, 50]]).expand(len(ranges), -1)
    width = int(sizes.sum(1).max()) + extra
    positions, probe = ragged.ranges_to_positions(starts, sizes, width)
    for q, row in enumerate(ranges):
        pairs = [
            (start + i, p) for p, (start, size) in enumerate(zip((100, 7, 50), row, strict=True)) for i in range(size)
        ]
        assert positions[q, : len(pairs)].tolist() == [at for at, _ in pairs]
        assert (positions[q, len(pairs) :] < 0).all()
        assert probe[q, : len(pairs)].tolist() == [p for _, p in pairs]


def test_all_changes_of_a_small_index_twice():
    """A sequence once written down: add, remove all, add, retrain, copy."""
    index = InvertedFile().make()
    x = lattice(20, D, seed=1)
    index.add(x)
    assert index.remove_ids(torch.arange(20)) == 20
    index.add(x)
    with few_training_rows():
        index.train(x)
    assert index.list_ids.sort().values.tolist() == list(range(20, 40))
    assert same_state(snapshot(deepcopy(index)), snapshot(index))
