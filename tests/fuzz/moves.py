"""Rules of the state machine that convert or copy the index: dtypes, copies, files, states, faiss."""

from __future__ import annotations

import pickle
import tempfile
from copy import deepcopy
from pathlib import Path

import torch
from hypothesis import strategies as st
from hypothesis.stateful import precondition, rule
from torch import nn

from tests.fuzz.answers import check_state
from tests.fuzz.changes import SEEDS, Changes, raises
from torch_ivf_module import from_faiss, load, to_faiss

DTYPES = {"half": torch.float16, "bfloat16": torch.bfloat16, "float": torch.float32}


class Moves(Changes):
    """Conversions and copies, which do not change answers."""

    @rule(name=st.sampled_from(sorted(DTYPES)), by_to=st.booleans(), nested=st.booleans())
    def convert(self, name: str, by_to: bool, nested: bool) -> None:
        dtype = DTYPES[name]
        module = nn.Sequential(self.index) if nested else self.index
        call = (lambda: module.to(dtype)) if by_to else getattr(module, name)
        if self.model.bits is not None:
            call()
            assert self.index.dtype == torch.float32
            return
        if not self.model.stored.to(dtype).isfinite().all():
            raises(ValueError, call)
            assert self.index.dtype == self.model.dtype
            return
        call()
        self.model.convert(dtype)

    @precondition(lambda self: self.model.dtype == torch.bfloat16)
    @rule(size=st.integers(1, 20), seed=SEEDS, by_to=st.booleans(), nested=st.booleans())
    def half_of_what_float16_does_not_hold(self, size: int, seed: int, by_to: bool, nested: bool) -> None:
        self.add("beyond_float16", size, seed)
        self.convert("half", by_to, nested)
        check_state(self.index, self.model)

    @rule(how=st.sampled_from(["deepcopy", "pickle", "to"]))
    def copy(self, how: str) -> None:
        if how == "deepcopy":
            self.index = deepcopy(self.index)
        elif how == "pickle":
            self.index = pickle.loads(pickle.dumps(self.index))
        else:
            assert self.index.to("cpu") is self.index

    @rule(strict=st.booleans(), assign=st.booleans(), nested=st.booleans(), filled=st.booleans())
    def state_dict(self, strict: bool, assign: bool, nested: bool, filled: bool) -> None:
        fresh = deepcopy(self.index) if filled else self.made()
        fresh.to(self.model.dtype)
        if nested:
            source, target = nn.Sequential(nn.Linear(1, 1), self.index), nn.Sequential(nn.Linear(1, 1), fresh)
        else:
            source, target = self.index, fresh
        state = {name: value.clone() for name, value in source.state_dict().items()}
        missing, unexpected = target.load_state_dict(state, strict=strict, assign=assign)
        assert not missing
        assert not unexpected
        self.index = fresh
        self.model.forget_order()

    @rule(suffix=st.sampled_from([".pt", ".safetensors"]))
    def save_and_load(self, suffix: str) -> None:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder, "index" + suffix)
            self.index.save(path)
            self.index = load(path)
        self.model.forget_order()

    @precondition(lambda self: self.model.bits is None)  # faiss encodes in another way
    @rule()
    def to_faiss_and_back(self) -> None:
        self.index = from_faiss(to_faiss(self.index))
        self.model.forget_groups()
        ids = self.model.ids
        self.model.next_id = 0
        self.model.next_id = self.model.number_after(ids)
        self.model.forget_order()
