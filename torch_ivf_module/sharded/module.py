"""The state of a sharded index: this process's part of it, how parts are dealt, and the whole as a state_dict.

W processes, N vectors in all, n rows of one process, L lists, d dim.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from ..functional import lists as ragged
from ..index import IndexIVFFlat, state
from ..index.base import IndexBase
from ..index.fits import Fits
from . import deal, whole
from .exchange import Exchange

T = TypeVar("T")
Self = TypeVar("Self", bound="ShardedModule")
SHARDS = ("rows", "lists")
_SETTINGS = ("k", "nprobe", "max_codes", "search_mode", "max_bytes")  # of the index, set here on every process alike


class ShardedModule(Fits):
    """A part of an index on each process; see `ShardedIndex`."""

    index: IndexBase

    def __init__(self, index: IndexBase, process_group: dist.ProcessGroup | None = None, shard: str = "rows") -> None:
        super().__init__()
        if not isinstance(index, IndexBase):
            raise TypeError(f"index must be a flat or inverted-file index, got {type(index).__name__}")
        if shard not in SHARDS:
            raise ValueError(f"shard must be one of {', '.join(map(repr, SHARDS))}, got {shard!r}")
        if shard == "lists" and not isinstance(index, IndexIVFFlat):
            raise ValueError(f"shard='lists' needs an IndexIVFFlat, got {type(index).__name__}; use shard='rows'")
        self._exchange = Exchange(process_group)
        self.shard, self.d, self.metric = shard, index.d, index.metric
        self.__dict__["index"] = index  # not a submodule: its buffers are not the model's
        self._forget()
        full = {name: getattr(index, name) for name in (*state.NAMES, state.NEXT_ID)}
        said = [index.ntotal, digest_of(full["centroids"]), digest_of(full["list_offsets"])]
        self._agree("ShardedIndex", (shard, index.config(), said), lambda: (None, []))
        if index.is_trained:
            self._keep(*whole.run_of(self._exchange, full), full["list_offsets"], "ShardedIndex")

    def _forget(self) -> None:
        self._ntotal = 0
        self._owners = torch.full((self.index._nlist,), deal.NOBODY, dtype=torch.int64, device="cpu")
        self._sizes: Tensor | None = None  # rows of all in each list (L + 1,), while known

    @property
    def ntotal(self) -> int:
        """Vectors of all processes together."""
        return self._ntotal

    @property
    def is_trained(self) -> bool:
        """Whether vectors can be added."""
        return self.index.is_trained

    def _agree(self, step: str, settings: object, prepare: Callable[[], tuple[T, list[int]]]) -> tuple[T, Tensor]:
        return self._exchange.agree(step, settings, self.index.device, prepare)

    # -- dealing -------------------------------------------------------------------------------------------

    def _owners_after(self, step: str, assigned: Tensor) -> Tensor:
        """Who owns each list (L,) once rows for the lists `assigned` (n,) have come."""
        if self.shard == "rows":
            return self._owners
        coming = self._exchange.sum(step, torch.bincount(assigned, minlength=self.index._nlist))
        sizes = self._list_sizes(step)[:-1] + coming
        return deal.by_size(sizes, self._owners, self._exchange.size)

    def _holders(self, run: whole.Run, owners: Tensor) -> Tensor:
        """The process that holds each row of a run."""
        return run.positions % self._exchange.size if self.shard == "rows" else owners.to(run.ids.device)[run.assigned]

    def _send(self, step: str, run: whole.Run, owners: Tensor) -> list[Tensor]:
        """Vectors, ids and lists of the rows that are dealt to this process, rank by rank."""
        holders = self._holders(run, owners)
        order = torch.sort(holders, stable=True).indices
        counts = torch.bincount(holders, minlength=self._exchange.size)
        return self._exchange.swap(step, counts, *(tensor[order] for tensor in run[:3]))[0]

    @contextmanager
    def _as_before_on_error(self) -> Iterator[None]:
        """Put the buffers back that were there, where a change cannot be finished."""
        self.index._pack()
        before = {name: self.index._raw(name) for name in state.NAMES}
        try:
            yield
        except Exception:
            self.index._put(**before)
            raise

    def _deal_again(self, step: str) -> None:
        """Send every vector to the process that should hold it."""
        run, sizes = whole.held(self._exchange, step, self.index)
        offsets = ragged.offsets_of(run.assigned[:0], sizes.shape[1])
        offsets[1:] = sizes.sum(0).cumsum(0)
        self._keep(run, False, offsets, step)

    def _keep(self, run: whole.Run, full: bool, offsets: Tensor, step: str) -> None:
        """Hold what is dealt to this process of an index with these offsets (L + 1,): of a full run without sending."""
        part, owners = self._part(run, full, offsets, step)
        self.index._latest = {}
        self.index._replace(*part)
        self._settle(offsets, owners)

    def _part(self, run: whole.Run, full: bool, offsets: Tensor, step: str) -> tuple[list[Tensor], Tensor]:
        """The packed vectors, offsets and ids that this process should hold, and the owners of all lists."""
        sizes = offsets.diff()
        owners = torch.full(sizes.shape, deal.NOBODY, dtype=torch.int64, device="cpu")
        if self.shard == "lists":
            owners = deal.by_size(sizes, owners, self._exchange.size)
        if full:
            mine = self._holders(run, owners) == self._exchange.rank
            rows, ids, assigned = (tensor[mine] for tensor in run[:3])
        else:
            rows, ids, assigned = self._send(step, run, owners)
        return list(ragged.pack(rows, ids, assigned, sizes.shape[0])), owners

    def _settle(self, offsets: Tensor, owners: Tensor) -> None:
        self._ntotal, self._owners, self._sizes = int(offsets[-1]), owners, None

    def _list_sizes(self, step: str) -> Tensor:
        """Rows of all processes in each list (L + 1,), and in none."""
        if self._sizes is None:
            mine = torch.stack([part.sizes for part in self.index._segments()[1]]).sum(0)
            self._sizes = self._exchange.sum(step, mine)
        return self._sizes

    # -- state ---------------------------------------------------------------------------------------------

    def _whole(self, step: str) -> dict[str, Tensor]:
        self._agree(step, None, lambda: (None, []))
        return whole.whole(self._exchange, step, self.index)

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination.update({prefix + name: tensor for name, tensor in self._whole("state_dict").items()})

    def _load_from_state_dict(
        self,
        state_dict: Mapping[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        """Take this process's part of a whole state: in full, as of a plain index, or in DTensors. What does not fit is
        left for the index of this process to refuse."""
        names = (*state.NAMES, state.NEXT_ID)
        given = {name: state_dict[prefix + name] for name in names if isinstance(state_dict.get(prefix + name), Tensor)}
        owners = None
        if self._fits_together(given):
            run, full = whole.run_of(self._exchange, given)
            number = max(int(given.get(state.NEXT_ID, 0)), state.next_id_after(run.ids))
            if not full:
                about = tuple(given["packed_embeddings"].shape), given["list_offsets"].shape[0]
                number = int(self._agree("load_state_dict", about, lambda: (None, [number]))[1][:, 0].max())
            part, owners = [run.packed, given["list_offsets"], run.ids], self._owners
            if given["list_offsets"].shape[0]:
                part, owners = self._part(run, full, given["list_offsets"], "load_state_dict")
            part.append(torch.tensor(number, device=run.ids.device))
            state_dict = {**state_dict, **{prefix + name: own for name, own in zip(names[1:], part, strict=True)}}
        refused = len(error_msgs)
        self.index._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )
        if owners is not None and len(error_msgs) == refused:
            self._forget()
            if self.index.is_trained:
                self._settle(given["list_offsets"], owners)

    def _fits_together(self, given: Mapping[str, Tensor]) -> bool:
        whole_state = all(name in given for name in state.NAMES)
        if not whole_state or state.misfit_shapes(given, self.d, self.index._flat):
            return False
        return state.misfit_offsets(given["list_offsets"], given["packed_embeddings"].shape[0]) is None

    def _apply(self: Self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        self.index._apply(fn, recurse)
        self._sizes = None if self._sizes is None else self._sizes.to(self.index.device)
        return super()._apply(fn, recurse)

    def __getattr__(self, name: str) -> Any:
        # torch.distributed.checkpoint.state_dict looks for what stands in a state_dict.
        if name in (*state.NAMES, state.NEXT_ID, *_SETTINGS):
            return getattr(self.index, name)
        return super().__getattr__(name)

    def __setattr__(self, name: str, value: Any) -> None:
        if name in _SETTINGS:
            setattr(self.index, name, value)
        else:
            super().__setattr__(name, value)


def digest_of(tensor: Tensor) -> int:
    """A number for the bytes of a tensor."""
    return zlib.crc32(tensor.detach().cpu().contiguous().numpy().tobytes())
