"""Indexes inside data-parallel models."""

from __future__ import annotations

import sys
from types import FrameType
from typing import Any

import torch.distributed as dist
from torch import nn
from torch.nn.modules.module import register_module_module_registration_hook
from torch.nn.parallel import DistributedDataParallel

from .graph import SearchGraph
from .index.base import IndexBase
from .index.module import OWN_BUFFERS


def ignore_in_ddp(model: nn.Module) -> list[str]:
    """Keep DistributedDataParallel from broadcasting vectors: call it on `model` before wrapping that.

    DDP sends the buffers of rank 0 to every rank before each forward, and of an index that would be all its vectors.
    This puts the names of every index's and every graph's own buffers into ``model._ddp_params_and_buffers_to_ignore``,
    from where DDP takes them; names that are there already stay. Each rank then has to hold the same index by itself,
    by loading the same file, say. Returns the names added.

    >>> from torch_ivf_module import IndexFlatL2, ignore_in_ddp
    >>> ignore_in_ddp(nn.Sequential(nn.Linear(2, 2), IndexFlatL2(2)))[:2]
    ['1.centroids', '1.packed_embeddings']
    """
    names = list(_buffers(model))
    before = list(getattr(model, "_ddp_params_and_buffers_to_ignore", []))
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, [*before, *names])
    return names


def _buffers(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """The shapes of the own buffers of every index and every graph in a model, by their names in it."""
    return {
        f"{prefix}.{name}" if prefix else name: tuple(buffer.shape)
        for prefix, module in model.named_modules()
        if isinstance(module, (IndexBase, SearchGraph))
        for name, buffer in module.named_buffers(recurse=False)
        if name in OWN_BUFFERS or isinstance(module, SearchGraph)
    }


def _check_ranks(wrapper: nn.Module, name: str, model: nn.Module | None) -> None:
    """As DistributedDataParallel takes its module: refuse indexes of other sizes on other ranks.

    It compares the shapes of parameters, but not those of buffers, and sends rank 0's to all: with gloo a larger one
    ends the process and a smaller one overwrites the beginning, with nccl the processes wait for each other.
    """
    if not isinstance(wrapper, DistributedDataParallel) or name != "module" or model is None:
        return
    ignored = getattr(model, "_ddp_params_and_buffers_to_ignore", ())
    shapes = {key: shape for key, shape in _buffers(model).items() if key not in ignored}
    if not shapes or not _sends_buffers(wrapper):
        return
    every: list[Any] = [None] * dist.get_world_size(wrapper.process_group)
    dist.all_gather_object(every, shapes, group=wrapper.process_group)
    for rank, others in enumerate(every):
        for key in {**every[0], **others}:
            here, there = every[0].get(key), others.get(key)
            if here != there:
                raise RuntimeError(
                    f"DistributedDataParallel would send the buffers of rank 0 to every rank, but {key} has shape "
                    f"{here} on rank 0 and {there} on rank {rank}: load the same index on every rank, or call "
                    "torch_ivf_module.ignore_in_ddp(model) before wrapping it, and each rank keeps its own"
                )


def _sends_buffers(wrapper: DistributedDataParallel) -> bool:
    """Whether the constructor that is running will send buffers.

    Its arguments are read off its frame, because it notes them only after it has taken the module.
    """
    frame: FrameType | None = sys._getframe()
    while frame is not None and frame.f_code is not DistributedDataParallel.__init__.__code__:
        frame = frame.f_back
    if frame is None:
        return False
    forward, always = frame.f_locals.get("forward_sync_buffers"), frame.f_locals.get("broadcast_buffers")
    return always is not False if forward is None else bool(forward or frame.f_locals.get("init_sync"))


register_module_module_registration_hook(_check_ranks)
