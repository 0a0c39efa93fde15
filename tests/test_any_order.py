"""Calls that change an index in any order, against a list of ids and vectors."""

from __future__ import annotations

import pytest
import torch
from hypothesis import strategies as st
from hypothesis.stateful import rule

from tests.datasets import lattice
from tests.problems import few_training_rows
from tests.test_properties import IDS, SEEDS, SIZES, STEPS, D, Flat, InvertedFile


class _More:
    """Rules for what the machines of test_properties do not do."""

    @rule(size=SIZES, ids=st.lists(IDS, max_size=6), seed=SEEDS, add_id=st.integers(-3, 50))
    def merge(self, size, ids, seed, add_id):
        other = self.make()
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
        """Take some out and put the same ids in again, with nothing read in between."""
        if self.rows:
            ids = list(dict.fromkeys(self.rows[(pick + i) % len(self.rows)][0] for i in range(size)))
            self.remove(ids)
            self.add_with_ids(ids, pick % 1000)

    @rule(seed=SEEDS, k=st.integers(1, 12))
    def reconstruct_what_is_found(self, seed, k):
        queries = lattice(3, D, seed=seed, reach=5) + 0.5
        D_, I, R = self.index.search_and_reconstruct(queries, k)
        padding = I == -1
        assert torch.equal(R.isnan().all(2), padding)
        assert torch.equal((R - queries[:, None]).square().sum(2)[~padding], D_[~padding])
        for id, x in zip(I[~padding].tolist(), R[~padding], strict=True):
            assert any(id == other and torch.equal(x.float(), y) for other, y in self.rows)


class AnyInvertedFile(_More, InvertedFile):
    @rule()
    def retrain(self):
        if self.index.ntotal >= self.index.nlist:
            with few_training_rows():
                report = self.index.retrain(niter=1)
                assert 0 <= report.moved <= report.total == len(self.rows)
                self.index.train(lattice(60, D, seed=9, reach=4), niter=2)  # as `make` does: `merge` needs it


class AnyFlat(_More, Flat):
    pass


TestAnyInvertedFile = AnyInvertedFile.TestCase


TestAnyInvertedFile.settings = STEPS


TestAnyFlat = AnyFlat.TestCase


TestAnyFlat.settings = STEPS
