"""torch.distributed.checkpoint into an index that is still empty."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata

from .index import row_format, schema


class IndexLoadPlanner(DefaultLoadPlanner):
    """A load planner that gives the buffers of indexes their saved sizes; otherwise torch's DefaultLoadPlanner.

    `torch.distributed.checkpoint.load` writes into existing tensors, and those of a new index are too small. This
    planner first puts tensors of the saved sizes into the state_dict, on the same devices. Arguments are those of
    DefaultLoadPlanner.

    >>> import tempfile, torch.distributed.checkpoint as dcp
    >>> from torch_ivf_module import IndexFlatL2
    >>> index, fresh = IndexFlatL2(2), IndexFlatL2(2)
    >>> index.add(torch.eye(2))
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     _ = dcp.save({"index": index}, checkpoint_id=folder, no_dist=True)
    ...     dcp.load({"index": fresh}, checkpoint_id=folder, planner=IndexLoadPlanner(), no_dist=True)
    >>> fresh.ntotal
    2
    """

    def set_up_planner(
        self, state_dict: dict[str, Any], metadata: Metadata | None = None, is_coordinator: bool = False
    ) -> None:
        """What torch calls before it plans the reading."""
        if metadata is not None:
            _resize(state_dict, metadata, "")
        super().set_up_planner(state_dict, metadata, is_coordinator)


def _empty(size: torch.Size, dtype: torch.dtype, like: Tensor) -> Tensor:
    """A tensor of that size, divided among processes as `like` is."""
    from torch.distributed.tensor import DTensor, empty

    if isinstance(like, DTensor):
        return empty(size, dtype=dtype, device_mesh=like.device_mesh, placements=like.placements)
    return torch.empty(size, dtype=dtype, device=like.device)


def _resize(held: Any, metadata: Metadata, prefix: str) -> None:
    """Exchange the buffers of indexes in `held`, and in the dicts and lists within it, for empty ones of the saved
    sizes. Keys are joined as torch joins them."""
    inside = held.items() if isinstance(held, dict) else enumerate(held) if isinstance(held, (list, tuple)) else ()
    for key, value in inside:
        _resize(value, metadata, f"{prefix}{key}.")
    if not isinstance(held, dict):
        return
    held_names = [key for key in held if isinstance(key, str)]
    parents = [key.removesuffix("centroids") for key in held_names if key.rpartition(".")[2] == "centroids"]
    kinds = [schema.names(rows) for rows in row_format.NAMES]
    found = [(parent, kind) for parent in parents for kind in kinds if all(parent + name in held for name in kind)]
    for parent, kind in found:
        held.pop(parent + schema.GROUPS, None)  # a state that was saved has them, or not, whatever the index has
        for name in (*kind, schema.GROUPS):
            saved = metadata.state_dict_metadata.get(prefix + parent + name)
            old = held.get(parent + name)
            if isinstance(saved, TensorStorageMetadata) and (old is None or old.shape != saved.size):
                like = held[parent + "list_ids"] if old is None else old
                held[parent + name] = _empty(saved.size, saved.properties.dtype, like)
