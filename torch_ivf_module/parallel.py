"""Indexes inside data-parallel models."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from .graph import SearchGraph
from .index.base import IndexBase


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
    names = list(_shapes(model))
    before = list(getattr(model, "_ddp_params_and_buffers_to_ignore", []))
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, [*before, *names])
    return names


def check_ddp(model: nn.Module, group: dist.ProcessGroup | None = None) -> None:
    """Raise RuntimeError, on every rank, if the indexes in `model` have other sizes on other ranks.

    For a model that DistributedDataParallel is to wrap without `ignore_in_ddp`: DDP compares the parameters of the
    ranks, but not their buffers, and of other sizes these end or stop the processes, or are overwritten in part. Every
    rank of `group` (by default all) has to call it, as it is a collective; the shapes of buffers are sent, no values.
    Names in ``model._ddp_params_and_buffers_to_ignore`` are left out. It says nothing of what is added afterwards.

    >>> from torch_ivf_module import IndexFlatL2, check_ddp
    >>> model = nn.Sequential(nn.Linear(2, 2), IndexFlatL2(2))
    >>> check_ddp(model)  # doctest: +SKIP
    >>> model = nn.parallel.DistributedDataParallel(model)  # doctest: +SKIP
    """
    ignored = getattr(model, "_ddp_params_and_buffers_to_ignore", ())
    shapes = {name: shape for name, shape in _shapes(model).items() if name not in ignored}
    every = _gathered(shapes, next((buffer.device for buffer in model.buffers()), torch.device("cpu")), group)
    for rank, others in enumerate(every):
        for name in {**every[0], **others}:
            first, other = every[0].get(name), others.get(name)
            if first != other:
                raise RuntimeError(
                    f"DistributedDataParallel would send the buffers of rank 0 to every rank, but {name} has shape "
                    f"{first} on rank 0 and {other} on rank {rank}: load the same index on every rank, or call "
                    "torch_ivf_module.ignore_in_ddp(model) before wrapping it, and each rank keeps its own"
                )


def _shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """The shapes of the own buffers of every index and every graph in a model, by their names in it."""
    return {
        f"{prefix}.{name}" if prefix else name: tuple(buffer.shape)
        for prefix, module in model.named_modules()
        if isinstance(module, (IndexBase, SearchGraph))
        for name, buffer in module.named_buffers(recurse=False)
        if isinstance(module, SearchGraph) or name in module.store.own
    }


def _gathered(value: Any, device: torch.device, group: dist.ProcessGroup | None) -> list[Any]:
    """`value` of every rank; nccl sends it by way of `device`, the model's, whichever device is the current one."""
    every: list[Any] = [None] * dist.get_world_size(group)
    if device.type == "cuda":
        with torch.cuda.device(device):
            dist.all_gather_object(every, value, group=group)
    else:
        dist.all_gather_object(every, value, group=group)
    return every
