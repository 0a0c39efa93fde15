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
    """Exclude the buffers of indexes from the broadcasts of DistributedDataParallel. Call it before wrapping `model`.

    DDP sends the buffers of rank 0 to every rank before each forward. For an index these are all its vectors. This
    function adds the names of the buffers of all indexes and graphs to ``model._ddp_params_and_buffers_to_ignore``,
    which DDP reads. Each rank must then load the same index itself, for example from the same file. Returns the names
    that were added.

    >>> from torch_ivf_module import IndexFlatL2, ignore_in_ddp
    >>> ignore_in_ddp(nn.Sequential(nn.Linear(2, 2), IndexFlatL2(2)))[:2]
    ['1.centroids', '1.packed_embeddings']
    """
    names = list(_shapes(model))
    before = list(getattr(model, "_ddp_params_and_buffers_to_ignore", []))
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, [*before, *names])
    return names


def check_ddp(model: nn.Module, group: dist.ProcessGroup | None = None) -> None:
    """Raise RuntimeError on every rank if the indexes in `model` do not have the same sizes on all ranks.

    Call it before wrapping `model` in DistributedDataParallel without `ignore_in_ddp`. DDP does not compare the sizes
    of buffers: if they differ, processes end or hang, or vectors are overwritten. It is a collective call: every rank
    of `group` (by default all) must make it. Only the shapes of buffers are sent. Names in
    ``model._ddp_params_and_buffers_to_ignore`` are left out. Later changes of the indexes are not checked.

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
