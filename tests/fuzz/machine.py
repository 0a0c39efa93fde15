"""The state machine: an index, its model, and the rules that search both."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from hypothesis import strategies as st
from hypothesis.stateful import initialize, invariant, precondition, rule
from torch import Tensor

from tests.fuzz import against_faiss, answers
from tests.fuzz.answers import Query
from tests.fuzz.changes import CHOICES, DATA, SEEDS
from tests.fuzz.filters import EXCLUSIONS, SELECTORS, exclusions_of, selector_of
from tests.fuzz.model import Model
from tests.fuzz.moves import Moves
from tests.fuzz.vectors import GENTLE, vectors
from tests.problems import DTYPES, METRICS, MODES, few_training_rows
from torch_ivf_module import IndexFlatIP, IndexFlatL2, IndexIVFFlat, IndexIVFScalarQuantizer, IndexScalarQuantizer
from torch_ivf_module.index import IndexFlat
from torch_ivf_module.index.coding import SETTINGS

DIMS = (1, 2, 3, 4, 5, 8, 13, 16, 33, 64, 100, 256, 512, 1536, 4096, 8192)
KS = st.one_of(st.integers(1, 12), st.sampled_from([1, 50, 400, 3000]))
COUNTS = st.integers(0, 9)
NPROBES = st.integers(1, 14)
SPOILT = {"nan": torch.nan, "inf": torch.inf, "-inf": -torch.inf}


@dataclass
class Tally:
    """Counters of what has run."""

    cases: int = 0
    operations: int = 0
    comparisons: int = 0


TALLY = Tally()


def compared() -> None:
    TALLY.comparisons += 1


class Fuzz(Moves):
    """Any index, any metric, any storage dtype."""

    @initialize(
        ivf=st.booleans(),
        metric=st.sampled_from(METRICS),
        dtype=st.sampled_from([str(dtype).removeprefix("torch.") for dtype in DTYPES]),
        bits=st.sampled_from([None, None, 8, 4]),
        d=st.sampled_from(DIMS),
        nlist=st.integers(1, 12),
        data=DATA.filter(lambda data: data != "overflowing"),
        seed=SEEDS,
    )
    def start(
        self, ivf: bool, metric: str, dtype: str, d: int, nlist: int, data: str, seed: int, bits: int | None = None
    ) -> None:
        TALLY.cases += 1
        dtype = dtype if bits is None else "float32"
        self.settings = dict(ivf=ivf, metric=metric, dtype=getattr(torch, dtype), d=d, nlist=nlist)
        self.model = Model(d, metric, getattr(torch, dtype), bits)
        self.index = self.made()
        if ivf:
            with few_training_rows():
                self.index.train(self.rows(data, 2 * nlist + seed % 60, seed), niter=3)
            self.took_centroids()

    def made(self) -> Any:
        """An empty index with the settings of this sequence."""
        d, metric, dtype, nlist = (self.settings[name] for name in ("d", "metric", "dtype", "nlist"))
        if self.model.bits is not None and self.settings["ivf"]:
            return IndexIVFScalarQuantizer(d, nlist=nlist, metric=metric, bits=self.model.bits)
        if self.model.bits is not None:
            return IndexScalarQuantizer(d, self.model.bits, metric)
        if self.settings["ivf"]:
            return IndexIVFFlat(d, nlist=nlist, metric=metric, dtype=dtype)
        if metric == "cosine":
            return IndexFlat(d, metric, dtype=dtype)
        return {"l2": IndexFlatL2, "ip": IndexFlatIP}[metric](d, dtype=dtype)

    @invariant()
    def counts(self) -> None:
        if not hasattr(self, "index"):
            return
        TALLY.operations += 1
        assert self.index.ntotal == self.model.n
        assert int(self.index.next_id) == self.model.next_id
        assert self.index.dtype == self.model.dtype
        assert self.index.centroids.dtype == torch.float32

    # -- searches -----------------------------------------------------------------------------------------

    def queries(self, data: str, count: int, seed: int, own: bool, spoilt: str | None = None) -> Tensor:
        """Queries (count, d): of the kind `data`; if `own`, every second is a stored row; the last with `spoilt`."""
        x = vectors(data, count, self.model.d, seed, self.model.dtype)
        if own and self.model.n:
            rows = torch.randint(0, self.model.n, (len(x[::2]),), generator=torch.Generator().manual_seed(seed))
            x[::2] = self.model.stored[rows].float()
        if spoilt:
            x[-1:, seed % self.model.d] = SPOILT[spoilt]
        return x

    @property
    def nlist(self) -> int:
        return 1 if self.model.centroids is None else len(self.model.centroids)

    def selector(self, choice: str | None, seed: int) -> Tensor | None:
        return None if choice is None else self.chosen(choice, seed)[0]

    @rule(mode=st.sampled_from(MODES), data=DATA, count=COUNTS, seed=SEEDS, own=st.booleans(), k=KS, nprobe=NPROBES)
    def search(self, mode: str, data: str, count: int, seed: int, own: bool, k: int, nprobe: int) -> None:
        self.index.search_mode = mode
        answers.check_search(self.index, self.model, Query(self.queries(data, count, seed, own), k, nprobe))
        compared()

    @rule(
        mode=st.sampled_from(MODES),
        data=DATA,
        seed=SEEDS,
        spoilt=st.sampled_from([None, *SPOILT]),
        k=KS,
        nprobe=NPROBES,
        max_codes=st.sampled_from([None, 1, 5, 40, 300]),
        profile=st.sampled_from(["speed", "exact", "approx", "approx_fast"]),
        choice=st.one_of(st.none(), CHOICES),
    )
    def search_with(
        self,
        mode: str,
        data: str,
        seed: int,
        spoilt: str | None,
        k: int,
        nprobe: int,
        max_codes: int | None,
        profile: str,
        choice: str | None,
    ) -> None:
        self.index.search_mode = mode
        x = self.queries(data, 7, seed, own=True, spoilt=spoilt)
        cap = None if self.model.centroids is None else max_codes
        query = Query(x, k, nprobe, cap, profile, self.selector(choice, seed))
        answers.check_search(self.index, self.model, query)
        compared()

    @rule(
        mode=st.sampled_from(MODES),
        data=DATA,
        count=COUNTS,
        seed=SEEDS,
        spoilt=st.sampled_from([None, None, None, *SPOILT]),
        k=KS,
        nprobe=NPROBES,
        max_codes=st.sampled_from([None, None, 5, 40]),
        profile=st.sampled_from(["speed", "speed", "exact"]),
        form=st.sampled_from([None, "shared", *SELECTORS]),
        exclude=st.sampled_from([None, *EXCLUSIONS]),
        factor=st.sampled_from([None, None, 0.5, 1.001]),
        grouped=st.sampled_from([None, "groups", "group_by", "both"]),
    )
    def search_filtered(
        self,
        mode: str,
        data: str,
        count: int,
        seed: int,
        spoilt: str | None,
        k: int,
        nprobe: int,
        max_codes: int | None,
        profile: str,
        form: str | None,
        exclude: str | None,
        factor: float | None,
        grouped: str | None = None,
    ) -> None:
        """A filter and a group for each query: a search, or with `factor` a range search."""
        self.index.search_mode = mode
        x, ids = self.queries(data, count, seed, own=True, spoilt=spoilt), self.model.ids
        cap = None if self.model.centroids is None or factor is not None else max_codes
        shared = self.selector("some", seed) if form == "shared" else None
        chosen = selector_of(form, ids, count, seed) if form in SELECTORS else shared
        excluded = exclusions_of(exclude, ids, count, seed) if exclude else None
        query = Query(x, k, nprobe, cap, profile, chosen, excluded)
        if grouped in ("groups", "both"):
            known = torch.cat([self.model.groups, torch.tensor([-1, 123])])
            picks = torch.randint(0, len(known), (count,), generator=torch.Generator().manual_seed(seed))
            query = query._replace(groups=known[picks])
        if grouped in ("group_by", "both") and factor is None and len(ids.unique()) == len(ids):
            answers.check_group_by(self.index, self.model, query._replace(group_by=1 + seed % 3))
        elif factor is None:
            answers.check_search(self.index, self.model, query)
        else:
            answers.check_range_search(self.index, self.model, query, seed, factor)
        compared()

    @rule(codes=st.sampled_from(SETTINGS))
    def set_codes(self, codes: str | int | None) -> None:
        """The searches that follow may read 8-bit codes; changes drop them."""
        self.index.codes = codes

    @rule(data=DATA, seed=SEEDS, nprobe=NPROBES)
    def modes_agree(self, data: str, seed: int, nprobe: int) -> None:
        """One search in every mode; the later ones use what the first has packed and cached."""
        query = Query(self.queries(data, 5, seed, own=True), 10, nprobe)
        for mode in MODES:
            self.index.search_mode = mode
            answers.check_search(self.index, self.model, query)
            compared()

    @rule(
        data=DATA,
        count=COUNTS,
        seed=SEEDS,
        own=st.booleans(),
        spoilt=st.sampled_from([None, None, None, *SPOILT]),
        nprobe=NPROBES,
        factor=st.sampled_from([0.0, 0.5, 0.999, 1.0, 1.001, 2.0, 1e6]),
        choice=st.one_of(st.none(), CHOICES),
    )
    def range_search(
        self,
        data: str,
        count: int,
        seed: int,
        own: bool,
        spoilt: str | None,
        nprobe: int,
        factor: float,
        choice: str | None,
    ) -> None:
        query = Query(self.queries(data, count, seed, own, spoilt), 1, nprobe, selector=self.selector(choice, seed))
        answers.check_range_search(self.index, self.model, query, seed, factor)
        compared()

    @rule(data=DATA, count=COUNTS, seed=SEEDS, own=st.booleans(), k=KS, nprobe=NPROBES)
    def search_and_reconstruct(self, data: str, count: int, seed: int, own: bool, k: int, nprobe: int) -> None:
        query = Query(self.queries(data, count, seed, own), min(k, 50), nprobe)
        answers.check_search_and_reconstruct(self.index, self.model, query)
        compared()

    @rule(pick=SEEDS)
    def reconstruct(self, pick: int) -> None:
        answers.check_reconstruct(self.index, self.model, pick)
        compared()

    @rule(
        data=st.sampled_from(GENTLE),
        count=COUNTS,
        seed=SEEDS,
        own=st.booleans(),
        k=st.integers(1, 40),
        nprobe=NPROBES,
        max_codes=st.sampled_from([None, 5, 40]),
        layout=st.sampled_from(["rows", "tiles"]),
    )
    @precondition(lambda self: self.gentle)
    def graph(
        self, data: str, count: int, seed: int, own: bool, k: int, nprobe: int, max_codes: int | None, layout: str
    ) -> None:
        if self.model.centroids is None:
            max_codes = None
        query = Query(self.queries(data, count, seed, own), k, nprobe, max_codes)
        answers.check_graph(self.index, self.model, query, layout)
        compared()

    @rule()
    def state(self) -> None:
        answers.check_state(self.index, self.model)
        compared()

    @precondition(lambda self: self.gentle)
    @rule(data=st.sampled_from(GENTLE), count=COUNTS, seed=SEEDS, own=st.booleans(), k=KS, nprobe=NPROBES)
    def as_faiss(self, data: str, count: int, seed: int, own: bool, k: int, nprobe: int) -> None:
        x = self.queries(data, count, seed, own)
        against_faiss.check_flat(self.index, self.model, x, k)
        if self.model.bits is None:  # faiss encodes in another way
            against_faiss.check_same_lists(self.index, self.model, x, k, min(nprobe, self.nlist))
        compared()
