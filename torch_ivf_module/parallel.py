"""Indexes inside data-parallel models."""

from __future__ import annotations

from torch import nn
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
    names = [
        f"{prefix}.{name}" if prefix else name
        for prefix, module in model.named_modules()
        if isinstance(module, (IndexBase, SearchGraph))
        for name in (OWN_BUFFERS if isinstance(module, IndexBase) else dict(module.named_buffers()))
    ]
    before = list(getattr(model, "_ddp_params_and_buffers_to_ignore", []))
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, [*before, *names])
    return names
