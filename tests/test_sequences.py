"""Random sequences of changes and searches, compared with a list of (id, vector)."""

from __future__ import annotations

import pickle
from copy import deepcopy

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from tests.datasets import lattice
from tests.oracle import StoredRows, check, check_range, probed
from tests.problems import few_training_rows
from tests.states import same_state, snapshot
from torch_ivf_module import IndexFlatL2, IndexIVFFlat

D = 4
NLIST = 5
SIZES = st.integers(0, 12)
SEEDS = st.integers(0, 2**20)
IDS = st.one_of(st.integers(-5, 40), st.sampled_from([2**40, -(2**63), 2**62])).filter(lambda id: id != -1)


class Bookkeeping(RuleBasedStateMachine):
    """An index and a list of (id, vector). Vectors of integers, so that distances are exact and ties frequent."""

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
        stored = [id for id, _ in self.rows]
        ids = list({stored[pick % len(stored)] for pick in picks if stored})
        ids = [id for id in ids if stored.count(id) == 1]
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
        """Integers below 256 are exact in every storage dtype."""
        expected = {"half": torch.float16, "bfloat16": torch.bfloat16, "float": torch.float32, "to": torch.float16}
        dtype = expected.get(how, self.index.dtype)
        self.index.to(dtype) if how == "to" else getattr(self.index, how)()
        assert self.index.dtype == dtype

    @rule(size=SIZES, seed=SEEDS, number=st.booleans())
    def add_and_remove_again(self, size, seed, number):
        """Remove rows while they are pending, so that no row is."""
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

    def stored(self):
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
        stored = self.stored()
        check(self.index.search(queries, k), queries, stored, "l2", k)
        radius = float(seed % 40)
        check_range(self.index.range_search(queries, radius), queries, stored, "l2", radius)

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

    in_order = True  # whether `reconstruct` gives the row added last of a duplicate id; a state_dict loses their order

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


    @rule(size=SIZES, ids=st.lists(IDS, max_size=6), seed=SEEDS, add_id=st.integers(-3, 50))
    def merge(self, size, ids, seed, add_id):
        other = deepcopy(self.index)
        other.reset()
        x, y = self.vectors(size, seed), self.vectors(len(ids), seed + 1)
        other.add(x)
        other.add_with_ids(y, torch.tensor(ids, dtype=torch.int64))
        moved = [(id + add_id, row) for id, row in zip([*range(size), *ids], [*x, *y], strict=True)]
        if any(id == -1 or not -(2**63) <= id < 2**63 for id, _ in moved):
            with pytest.raises(ValueError, match="add_id"):
                self.index.merge_from(other, add_id)
            assert other.ntotal == size + len(ids)
            return
        self.index.merge_from(other, add_id)
        assert other.ntotal == 0
        self.rows += moved
        self.next_id = max([self.next_id, *(id + 1 for id, _ in moved)])

    @rule(ids=st.lists(st.one_of(IDS, st.just(-1)), max_size=8))
    def copy_subset(self, ids):
        before = self.index.ntotal
        part = self.index.copy_subset(torch.tensor(ids, dtype=torch.int64))
        kept = [(id, x) for id, x in self.rows if id in ids]
        state = part.state_dict()
        stored = sorted(zip(state["list_ids"].tolist(), state["packed_embeddings"].tolist(), strict=True))
        assert stored == sorted((id, x.tolist()) for id, x in kept)
        assert self.index.ntotal == before
        part.remove_ids(torch.tensor(ids, dtype=torch.int64))
        assert part.ntotal == 0
        assert self.index.ntotal == before

    @rule(size=st.integers(1, 30), pick=st.integers(0, 10**6))
    def churn(self, size, pick):
        """Remove rows and add their ids again, with no search in between."""
        if self.rows:
            ids = list(dict.fromkeys(self.rows[(pick + i) % len(self.rows)][0] for i in range(size)))
            self.remove(ids)
            self.add_with_ids(ids, pick % 1000)

    @rule(seed=SEEDS, k=st.integers(1, 12))
    def search_and_reconstruct(self, seed, k):
        queries = lattice(3, D, seed=seed, reach=5) + 0.5
        D_, I, R = self.index.search_and_reconstruct(queries, k)
        padding = I == -1
        assert torch.equal(R.isnan().all(2), padding)
        assert torch.equal((R - queries[:, None]).square().sum(2)[~padding], D_[~padding])
        for id, x in zip(I[~padding].tolist(), R[~padding], strict=True):
            assert any(id == other and torch.equal(x.float(), y) for other, y in self.rows)


class InvertedFile(Bookkeeping):
    def make(self):
        index = IndexIVFFlat(D, nlist=NLIST, nprobe=NLIST)
        with few_training_rows():
            index.train(lattice(60, D, seed=9, reach=4), niter=2)
        return index

    @rule()
    def retrain(self):
        if self.index.ntotal >= self.index.nlist:
            with few_training_rows():
                report = self.index.retrain(niter=1)
                assert 0 <= report.moved <= report.total == len(self.rows)

    @rule(max_rows=st.sampled_from([6, 25, 1000]), seed=SEEDS)
    def rebalance(self, max_rows, seed):
        report = self.index.rebalance(max_rows=max_rows, seed=seed)
        assert 0 <= report.moved <= report.total == len(self.rows)


class Flat(Bookkeeping):
    def make(self):
        return IndexFlatL2(D)


STEPS = settings(max_examples=35, stateful_step_count=20)
TestInvertedFile = InvertedFile.TestCase
TestInvertedFile.settings = STEPS
TestFlat = Flat.TestCase
TestFlat.settings = STEPS


def test_train_and_copy_after_removing_everything():
    """Add, remove all, add, train, copy."""
    index = InvertedFile().make()
    x = lattice(20, D, seed=1)
    index.add(x)
    assert index.remove_ids(torch.arange(20)) == 20
    index.add(x)
    with few_training_rows():
        index.train(x)
    assert index.list_ids.sort().values.tolist() == list(range(20, 40))
    assert same_state(snapshot(deepcopy(index)), snapshot(index))
