"""The state of a sharded index: which rows this process stores, moving rows between processes, and the state_dict.

W processes, N vectors in all, n rows of one process, L lists, d dim.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..functional.lists import offsets_of, pack
from ..index import IndexIVF, schema, training, transactions
from ..index.base import IndexBase
from ..index.eager import refuse_recording, refuse_scripting
from ..index.module import load_buffers, misfit, own_loading
from . import global_state, placement
from .collectives import Exchange, Refused
from .global_state import LocalRows

T = TypeVar("T")
Self = TypeVar("Self", bound="ShardedModule")
SHARDS = ("rows", "lists")
_SETTINGS = ("k", "nprobe", "max_codes", "search_mode", "max_bytes", "codes")  # of the index, forwarded


class _Misfit(Exception):
    """A state does not fit the index. The error text is that of the index of this process, which refuses it too."""


class ShardedModule(nn.Module):
    """A module that stores a part of an index on each process; see `ShardedIndex`."""

    __prepare_scriptable__ = refuse_scripting
    train = training.train

    index: IndexBase

    def __init__(self, index: IndexBase, process_group: dist.ProcessGroup | None = None, shard: str = "rows") -> None:
        super().__init__()
        self.exchange = self._exchange = Exchange(process_group)
        full: dict[str, Tensor] = {}

        def prepare() -> tuple[None, list[int]]:
            _check_shard(index, shard)
            full.update({name: getattr(index, name) for name in index.store.names})
            return None, []

        device = index.device if isinstance(index, IndexBase) else self._exchange.device
        self._exchange.agree("ShardedIndex", device, prepare, lambda: (shard, index.config(), _fingerprint(full)))
        self.shard, self.d, self.metric = shard, index.d, index.metric
        self.__dict__["index"] = index  # not a submodule: its buffers are not the model's
        self._forget()
        if index.is_trained:
            self._store_part(*global_state.rows_of(self._exchange, full), full["list_offsets"], "ShardedIndex")

    def _forget(self) -> None:
        self._ntotal = 0
        self._owners = torch.full((self.index.store.nlist,), placement.NO_OWNER, dtype=torch.int64, device="cpu")
        self._sizes: Tensor | None = None  # rows of all processes in each list (L + 1,), once computed

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
        return cast(IndexIVF, self.index).nlist

    def config(self) -> dict[str, Any]:
        """The constructor arguments of the index of each process."""
        return self.index.config()

    def _agree(
        self,
        step: str,
        prepare: Callable[[], tuple[T, list[int]]],
        settings: Callable[[], object] = lambda: None,
    ) -> tuple[T, Tensor]:
        refuse_recording(step)  # before any communication, which cannot be recorded
        return self._exchange.agree(step, self.index.device, prepare, settings)

    # -- placement -----------------------------------------------------------------------------------------

    def _owners_after(self, step: str, assigned: Tensor) -> Tensor:
        """The owner of each list (L,) once rows are added to the lists `assigned` (n,)."""
        if self.shard == "rows":
            return self._owners
        coming = self._exchange.all_reduce(step, torch.bincount(assigned, minlength=self.index.store.nlist))
        sizes = self._list_sizes(step)[:-1] + coming
        return placement.assign_lists(sizes, self._owners, self._exchange.size)

    def _target_ranks(self, rows: LocalRows, owners: Tensor) -> Tensor:
        """The process (n,) that shall store each row."""
        if self.shard == "rows":
            return rows.positions % self._exchange.size
        return owners.to(rows.ids.device)[rows.assigned]

    def _send(self, step: str, rows: LocalRows, owners: Tensor) -> list[Tensor]:
        """Send local rows to the processes that shall store them; vectors, ids and lists of those received."""
        ranks = self._target_ranks(rows, owners)
        order = torch.sort(ranks, stable=True).indices
        counts = torch.bincount(ranks, minlength=self._exchange.size)
        return self._exchange.all_to_all(step, counts, *(tensor[order] for tensor in rows[:3]))[0]

    @contextmanager
    def _as_before_on_error(self, step: str) -> Iterator[None]:
        """A context that restores the buffers if a change fails, on this or on another process."""
        store = self.index.store
        before, _ = self._agree(step, lambda: (transactions.packed_snapshot(store), []))
        try:
            yield
        except Exception:
            transactions.restore(store, before)
            raise

    def _redistribute(self, step: str) -> None:
        """Send every row to the process that shall store it."""
        rows, sizes = global_state.local_rows(self._exchange, step, self.index)
        offsets = torch.nn.functional.pad(sizes.sum(0).cumsum(0), (1, 0))
        self._store_part(rows, False, offsets, step)

    def _store_part(self, rows: LocalRows, full: bool, offsets: Tensor, step: str) -> None:
        """Store this process's part of a global index with offsets (L + 1,); arguments as for `_part`."""
        part, owners = self._part(rows, full, offsets, step)
        self.index.store.ids.last_places = {}
        self.index.store.replace_lists(*part)
        self._set_placement(offsets, owners)

    def _part(self, rows: LocalRows, full: bool, offsets: Tensor, step: str) -> tuple[list[Tensor], Tensor]:
        """The packed vectors, offsets and ids that this process shall store, and the owners of all lists.

        `rows` are the local rows of a global index with offsets (L + 1,). They are sent to the processes that shall
        store them, unless each process has the rows of all (`full`).
        """
        sizes = offsets.diff()
        owners = torch.full(sizes.shape, placement.NO_OWNER, dtype=torch.int64, device="cpu")
        if self.shard == "lists":
            owners = placement.assign_lists(sizes, owners, self._exchange.size)
        received = [] if full else self._send(step, rows, owners)

        def packed() -> tuple[list[Tensor], list[int]]:
            here = self._target_ranks(rows, owners) == self._exchange.rank if full else None
            vectors, ids, assigned = received if here is None else (tensor[here] for tensor in rows[:3])
            return list(pack(vectors, ids, assigned, sizes.shape[0])), []

        return self._agree(step, packed)[0], owners

    def _set_placement(self, offsets: Tensor, owners: Tensor) -> None:
        self._ntotal, self._owners, self._sizes = int(offsets[-1]), owners, None

    def _list_sizes(self, step: str) -> Tensor:
        """Rows of all processes in each list (L + 1,); the last entry, for no list, is 0."""
        if self._sizes is None:
            mine = torch.stack([part.sizes for part in self.index.store.segments()[1]]).sum(0)
            self._sizes = self._exchange.all_reduce(step, mine)
        return self._sizes

    # -- state ---------------------------------------------------------------------------------------------

    def _global_buffers(self, step: str) -> dict[str, Tensor]:
        self._agree(step, lambda: (None, []))
        return global_state.global_buffers(self._exchange, step, self.index)

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination.update({prefix + name: tensor for name, tensor in self._global_buffers("state_dict").items()})

    def _load_from_state_dict(
        self, state_dict: Mapping[str, Any], prefix: str, local_metadata: dict[str, Any], strict: bool, *lists: Any
    ) -> None:
        """Load this process's part of a global state; other entries load as in any module."""
        missing_keys, _, error_msgs = lists
        names = self.index.store.saved
        with own_loading(self, state_dict, prefix, local_metadata, strict, *lists, names=names) as others:
            self._load_part(state_dict, prefix, local_metadata, strict, missing_keys, error_msgs)
            super()._load_from_state_dict(others, prefix, local_metadata, strict, *lists)

    def _load_part(
        self,
        state_dict: Mapping[str, Any],
        prefix: str,
        local_metadata: Mapping[str, Any],
        strict: bool,
        missing_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        """Load this process's part of a global state of full tensors, as of a plain index, or of DTensors.

        Nothing is loaded on any process unless the state fits on all. The index of this process refuses one that does
        not fit, with its own error text.
        """
        step, local = "load_state_dict", dict[str, Tensor]()

        def load() -> tuple[None, list[int]]:
            mine = {**state_dict, **{prefix + name: tensor for name, tensor in local.items()}}
            load_buffers(self.index, mine, prefix, local_metadata, strict, missing_keys, error_msgs)
            return None, []

        entries = {name: state_dict.get(prefix + name) for name in self.index.store.saved}
        given = {name: entry for name, entry in entries.items() if isinstance(entry, Tensor)}
        try:
            prepare = functools.partial(self._fitting, given, local, local_metadata)
            (rows, full), said = self._agree(step, prepare, lambda: _fingerprint(given))
        except _Misfit:
            load()
            return
        except Refused as error:  # not raised: all processes go on with what else the model loads
            error_msgs.append(f"{prefix or type(self).__name__}: {error}")
            return
        offsets, owners = given["list_offsets"], self._owners
        if offsets.shape[0]:
            part, owners = self._part(rows, full, offsets, step)
            local.update(zip(self.index.store.names[1:], part, strict=True))
        local[schema.NEXT_ID] = torch.tensor(int(said[:, 0].max()), device=rows.ids.device)
        with self._as_before_on_error(step):
            self._agree(step, load)
        self._forget()
        if self.index.is_trained:
            self._set_placement(offsets, owners)

    def _fitting(
        self, given: dict[str, Tensor], local: dict[str, Tensor], metadata: Mapping[str, Any]
    ) -> tuple[tuple[LocalRows, bool], list[int]]:
        """The local rows of a global state `given`, whether they are all of its rows, and its next_id.

        Writes the local rows to `local` as the buffers of an index. Raises _Misfit if `given` or `local` does not fit.
        """
        store = self.index.store
        if any(name not in given for name in store.names) or schema.misfit_shapes(given, store.format, store.flat):
            raise _Misfit
        offsets = given["list_offsets"]
        if schema.misfit_offsets(offsets, given[store.format.name].shape[0]):
            raise _Misfit
        rows, full = global_state.rows_of(self._exchange, given)
        local.update({**given, store.format.name: rows.packed, "list_ids": rows.ids})
        if offsets.shape[0]:
            local["list_offsets"] = offsets_of(rows.assigned, offsets.shape[0] - 1)
        if misfit(local, metadata, self.index):
            raise _Misfit
        return (rows, full), [max(int(given.get(schema.NEXT_ID, 0)), schema.next_id_after(rows.ids))]

    def _apply(self: Self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        self.index._apply(fn, recurse)
        self._sizes = None if self._sizes is None else self._sizes.to(self.index.device)
        return super()._apply(fn, recurse)

    def __getattr__(self, name: str) -> Any:
        # torch.distributed.checkpoint.state_dict reads the entries of a state_dict as attributes.
        if name in _SETTINGS or ("index" in self.__dict__ and name in self.index.store.saved):
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
    if index.store.grouped:
        raise ValueError("index has rows with groups, which a ShardedIndex does not support: use a plain index")
    if shard == "lists" and not isinstance(index, IndexIVF):
        raise ValueError(f"shard='lists' needs an inverted file, got {type(index).__name__}; use shard='rows'")
    if isinstance(index, IndexIVF) and index.auto_rebalance is not None:
        raise ValueError("index must have auto_rebalance = None to be sharded: processes must keep the same centroids")


def _fingerprint(given: Mapping[str, Tensor]) -> object:
    """Shape and digests of a global state, to compare it between processes. Vectors are too many to be read."""
    sharded = hasattr(packed := global_state.packed_of(given), "to_local")  # DTensors: processes have other local ids
    names = ("centroids", "list_offsets") if sharded else ("centroids", "list_offsets", "list_ids")
    return sharded, tuple(packed.shape), [global_state.digest_of(given[name]) for name in names]
