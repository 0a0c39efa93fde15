"""The state of a sharded index: this process's part of it, how parts are dealt, and the whole as a state_dict.

W processes, N vectors in all, n rows of one process, L lists, d dim.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..functional import lists as ragged
from ..index import IndexIVFFlat, schema, torch_ivf_compat
from ..index.base import IndexBase
from ..index.eager import refuse_recording, refuse_scripting
from ..index.module import load_buffers, misfit, own_loading
from . import global_state, placement
from .collectives import Exchange, Refused

T = TypeVar("T")
Self = TypeVar("Self", bound="ShardedModule")
SHARDS = ("rows", "lists")
_SETTINGS = ("k", "nprobe", "max_codes", "search_mode", "max_bytes")  # of the index, set here on every process alike


class _Misfit(Exception):
    """A state that is no index; what is wrong with it the index itself says best."""


class ShardedModule(nn.Module):
    """A part of an index on each process; see `ShardedIndex`."""

    __prepare_scriptable__ = refuse_scripting
    train = torch_ivf_compat.train

    index: IndexBase

    def __init__(self, index: IndexBase, process_group: dist.ProcessGroup | None = None, shard: str = "rows") -> None:
        super().__init__()
        self._exchange = Exchange(process_group)
        full: dict[str, Tensor] = {}

        def prepare() -> tuple[None, list[int]]:
            _check_shard(index, shard)
            full.update({name: getattr(index, name) for name in schema.NAMES})
            return None, []

        device = index.device if isinstance(index, IndexBase) else self._exchange.device
        self._exchange.agree("ShardedIndex", device, prepare, lambda: (shard, index.config(), _about(full)))
        self.shard, self.d, self.metric = shard, index.d, index.metric
        self.__dict__["index"] = index  # not a submodule: its buffers are not the model's
        self._forget()
        if index.is_trained:
            self._keep(*global_state.run_of(self._exchange, full), full["list_offsets"], "ShardedIndex")

    def _forget(self) -> None:
        self._ntotal = 0
        self._owners = torch.full((self.index.store.nlist,), placement.NOBODY, dtype=torch.int64, device="cpu")
        self._sizes: Tensor | None = None  # rows of all in each list (L + 1,), while known

    @property
    def ntotal(self) -> int:
        """Vectors of all processes together."""
        return self._ntotal

    @property
    def is_trained(self) -> bool:
        """Whether vectors can be added."""
        return self.index.is_trained

    @property
    def device(self) -> torch.device:
        """Where the vectors of this process are."""
        return self.index.device

    @property
    def dtype(self) -> torch.dtype:
        """The dtype vectors are stored in."""
        return self.index.dtype

    @property
    def nlist(self) -> int:
        """Number of lists of an inverted-file index; a flat one has no such attribute."""
        return cast(IndexIVFFlat, self.index).nlist

    def config(self) -> dict[str, Any]:
        """The constructor arguments of the index of each process."""
        return self.index.config()

    def _agree(
        self,
        step: str,
        prepare: Callable[[], tuple[T, list[int]]],
        settings: Callable[[], object] = lambda: None,
    ) -> tuple[T, Tensor]:
        refuse_recording(step)  # alone, because nothing can be gathered while it is recorded
        return self._exchange.agree(step, self.index.device, prepare, settings)

    # -- dealing -------------------------------------------------------------------------------------------

    def _owners_after(self, step: str, assigned: Tensor) -> Tensor:
        """Who owns each list (L,) once rows for the lists `assigned` (n,) have come."""
        if self.shard == "rows":
            return self._owners
        coming = self._exchange.sum(step, torch.bincount(assigned, minlength=self.index.store.nlist))
        sizes = self._list_sizes(step)[:-1] + coming
        return placement.by_size(sizes, self._owners, self._exchange.size)

    def _holders(self, run: global_state.Run, owners: Tensor) -> Tensor:
        """The process that holds each row of a run."""
        return run.positions % self._exchange.size if self.shard == "rows" else owners.to(run.ids.device)[run.assigned]

    def _send(self, step: str, run: global_state.Run, owners: Tensor) -> list[Tensor]:
        """Vectors, ids and lists of the rows that are dealt to this process, rank by rank."""
        holders = self._holders(run, owners)
        order = torch.sort(holders, stable=True).indices
        counts = torch.bincount(holders, minlength=self._exchange.size)
        return self._exchange.swap(step, counts, *(tensor[order] for tensor in run[:3]))[0]

    @contextmanager
    def _as_before_on_error(self, step: str) -> Iterator[None]:
        """Put the buffers back that were there, where a change cannot be finished, here or on another process."""
        store = self.index.store
        snapshot, _ = self._agree(step, lambda: (store.snapshot(), []))
        try:
            yield
        except Exception:
            store.restore(snapshot)
            raise

    def _deal_again(self, step: str) -> None:
        """Send every vector to the process that should hold it."""
        run, sizes = global_state.held(self._exchange, step, self.index)
        offsets = ragged.offsets_of(run.assigned[:0], sizes.shape[1])
        offsets[1:] = sizes.sum(0).cumsum(0)
        self._keep(run, False, offsets, step)

    def _keep(self, run: global_state.Run, full: bool, offsets: Tensor, step: str) -> None:
        """Hold what is dealt to this process of an index with these offsets (L + 1,): of a full run without sending."""
        part, owners = self._part(run, full, offsets, step)
        self.index.store.ids.last_lists = {}
        self.index.store.replace_lists(*part)
        self._settle(offsets, owners)

    def _part(self, run: global_state.Run, full: bool, offsets: Tensor, step: str) -> tuple[list[Tensor], Tensor]:
        """The packed vectors, offsets and ids that this process should hold, and the owners of all lists."""
        sizes = offsets.diff()
        owners = torch.full(sizes.shape, placement.NOBODY, dtype=torch.int64, device="cpu")
        if self.shard == "lists":
            owners = placement.by_size(sizes, owners, self._exchange.size)
        sent = [] if full else self._send(step, run, owners)

        def packed() -> tuple[list[Tensor], list[int]]:
            here = self._holders(run, owners) == self._exchange.rank if full else None
            rows, ids, assigned = sent if here is None else (tensor[here] for tensor in run[:3])
            return list(ragged.pack(rows, ids, assigned, sizes.shape[0])), []

        return self._agree(step, packed)[0], owners

    def _settle(self, offsets: Tensor, owners: Tensor) -> None:
        self._ntotal, self._owners, self._sizes = int(offsets[-1]), owners, None

    def _list_sizes(self, step: str) -> Tensor:
        """Rows of all processes in each list (L + 1,), and in none."""
        if self._sizes is None:
            mine = torch.stack([part.sizes for part in self.index.store.segments()[1]]).sum(0)
            self._sizes = self._exchange.sum(step, mine)
        return self._sizes

    # -- state ---------------------------------------------------------------------------------------------

    def _whole(self, step: str) -> dict[str, Tensor]:
        self._agree(step, lambda: (None, []))
        return global_state.whole(self._exchange, step, self.index)

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
        """Take this process's part of a whole state; whatever else the module holds loads as in any module."""
        args = (local_metadata, strict, missing_keys, unexpected_keys, error_msgs)
        names = (*schema.NAMES, schema.NEXT_ID)
        with own_loading(self, state_dict, prefix, *args, names=names) as rest:
            self._load_part(state_dict, prefix, local_metadata, strict, missing_keys, error_msgs)
            super()._load_from_state_dict(rest, prefix, *args)

    def _load_part(
        self,
        state_dict: Mapping[str, Any],
        prefix: str,
        local_metadata: Mapping[str, Any],
        strict: bool,
        missing_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        """Take this process's part of a whole state: in full, as of a plain index, or in DTensors. What does not fit is
        left for the index of this process to refuse; no process takes its part unless the state fits on all."""
        step, own = "load_state_dict", dict[str, Tensor]()

        def load() -> tuple[None, list[int]]:
            mine = {**state_dict, **{prefix + name: tensor for name, tensor in own.items()}}
            index = self.index
            load_buffers(index, index.store, mine, prefix, local_metadata, strict, missing_keys, error_msgs)
            return None, []

        names = (*schema.NAMES, schema.NEXT_ID)
        given = {name: state_dict[prefix + name] for name in names if isinstance(state_dict.get(prefix + name), Tensor)}
        try:
            (run, full), said = self._agree(
                step, lambda: self._fitting(given, own, local_metadata), lambda: _about(given)
            )
        except _Misfit:
            load()
            return
        except Refused as error:  # and the others go on too, to whatever else the model loads
            error_msgs.append(f"{prefix or type(self).__name__}: {error}")
            return
        offsets, owners = given["list_offsets"], self._owners
        if offsets.shape[0]:
            part, owners = self._part(run, full, offsets, step)
            own.update(zip(names[1:4], part, strict=True))
        own[schema.NEXT_ID] = torch.tensor(int(said[:, 0].max()), device=run.ids.device)
        with self._as_before_on_error(step):
            self._agree(step, load)
        self._forget()
        if self.index.is_trained:
            self._settle(offsets, owners)

    def _fitting(
        self, given: dict[str, Tensor], own: dict[str, Tensor], metadata: Mapping[str, Any]
    ) -> tuple[tuple[global_state.Run, bool], list[int]]:
        """The rows that this process was given of a state that fits, and the number that `add` goes on from.

        As a state they go into `own`. Raises _Misfit for any other state, with what is wrong in `own` or in `given`.
        """
        flat = self.index.store.flat
        if any(name not in given for name in schema.NAMES) or schema.misfit_shapes(given, self.d, flat):
            raise _Misfit
        offsets = given["list_offsets"]
        if schema.misfit_offsets(offsets, given["packed_embeddings"].shape[0]):
            raise _Misfit
        run, full = global_state.run_of(self._exchange, given)
        own.update({**given, "packed_embeddings": run.packed, "list_ids": run.ids})
        if offsets.shape[0]:
            own["list_offsets"] = ragged.offsets_of(run.assigned, offsets.shape[0] - 1)
        if misfit(own, metadata, self.index, self.index.store):
            raise _Misfit
        return (run, full), [max(int(given.get(schema.NEXT_ID, 0)), schema.next_id_after(run.ids))]

    def _apply(self: Self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        self.index._apply(fn, recurse)
        self._sizes = None if self._sizes is None else self._sizes.to(self.index.device)
        return super()._apply(fn, recurse)

    def __getattr__(self, name: str) -> Any:
        # torch.distributed.checkpoint.state_dict looks for what stands in a state_dict.
        if name in (*schema.NAMES, schema.NEXT_ID, *_SETTINGS):
            return getattr(self.index, name)
        return super().__getattr__(name)

    def __setattr__(self, name: str, value: Any) -> None:
        if name in _SETTINGS:
            setattr(self.index, name, value)
        else:
            super().__setattr__(name, value)


def _check_shard(index: object, shard: str) -> None:
    if not isinstance(index, IndexBase):
        raise TypeError(f"index must be a flat or inverted-file index, got {type(index).__name__}")
    if shard not in SHARDS:
        raise ValueError(f"shard must be one of {', '.join(map(repr, SHARDS))}, got {shard!r}")
    if shard == "lists" and not isinstance(index, IndexIVFFlat):
        raise ValueError(f"shard='lists' needs an IndexIVFFlat, got {type(index).__name__}; use shard='rows'")


def _about(given: Mapping[str, Tensor]) -> object:
    """What tells one whole index from another, on every process alike; vectors are too many to look at."""
    packed = given["packed_embeddings"]
    cut = hasattr(packed, "to_local")  # and so are the ids
    names = ("centroids", "list_offsets") if cut else ("centroids", "list_offsets", "list_ids")
    return cut, tuple(packed.shape), [global_state.digest_of(given[name]) for name in names]
