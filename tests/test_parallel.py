"""Indexes and graphs in data-parallel models."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from tests import jobs, processes
from tests.graphs import D, Model, alike, index_of
from torch_ivf_module import ignore_in_ddp


@pytest.mark.parametrize("job", [jobs.checked_with_different_rows, jobs.growing_apart_after_wrapping])
def test_ranks_with_different_rows_raise(job):
    assert processes.run(job, 2) == [0, 0]


def test_ignore_in_ddp_names_the_buffers_of_indexes_and_graphs():
    model = nn.Sequential(nn.Linear(D, D), nn.BatchNorm1d(D), index_of())
    model._ddp_params_and_buffers_to_ignore = ["0.weight"]
    names = ignore_in_ddp(model)
    assert names == [f"2.{name}" for name, _ in model[2].named_buffers()]
    assert model._ddp_params_and_buffers_to_ignore == ["0.weight", *names]
    model = Model(index_of().graph())
    assert "index.packed_embeddings" in ignore_in_ddp(model)


def test_ddp_does_not_broadcast_the_vectors(tmp_path):
    model = Model(index_of().graph())
    ignore_in_ddp(model)
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        wrapped = nn.parallel.DistributedDataParallel(model)
        x = torch.randn(4, 6)
        wrapped(x)[0].sum().backward()
        assert not wrapped.modules_buffers
        alike(wrapped(x), model(x))
    finally:
        torch.distributed.destroy_process_group()
