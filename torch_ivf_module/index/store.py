"""The inverted lists of an index: packed rows in the buffers of a module, pending rows, deleted rows, ids.

N packed rows, L lists, d dim, n ids, H hits. A row is a position among the packed or among the pending rows.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..functional.lists import InvertedLists
from ..functional.probe import Coarse
from ..functional.transforms import run_outside
from . import schema
from .coding import CodesCache
from .groups import groups_in, repacked
from .ids import IdLookup, Matches
from .integrity import CHECKSUMS, Integrity, VersionToken, refuse_without_values
from .pending import PendingUpdates, few, many_deleted
from .publishing import Versions
from .row_format import RowFormat


class ListStore:
    """The rows of an index, by list and by id.

    The packed rows are tensors in `buffers`, the `_buffers` of the module that owns the store. Added rows are pending,
    and removed ones marked as deleted, until `pack` writes both into the tensors: when they are many, or when code
    outside the index reads the tensors.

    Several threads may call the methods at the same time. Changes are made under `lock`. When it is released, a new
    version is published, which is what searches read: they see all of a change or nothing, and do not wait for it.
    """

    def __init__(self, buffers: dict[str, Tensor], format: RowFormat, metric: str, *, flat: bool) -> None:
        self.buffers, self.format, self.metric, self.flat = buffers, format, metric, flat
        self.d, self.names, self.saved = format.d, schema.names(format.name), schema.saved(format.name)
        self.own = (*self.saved, CHECKSUMS)  # all buffers of the index; `saved` are the entries of a state_dict
        self.version = VersionToken()
        self.graph: Any = None  # a SearchGraph of this version, None after a change
        self.ordering = "none"  # the order of the rows of each list, except the `unordered` rows added last
        self.unordered = 0
        self.ids = IdLookup()
        self._updates = PendingUpdates()
        self._integrity = Integrity()
        self.versions = Versions(self, self._integrity)
        self.lock = self.versions.lock
        self.handed_out: dict[str, Tensor] = {}  # the buffers that `hand_out` last returned, until they change

    # -- what is stored ------------------------------------------------------------------------------------

    @property
    def packed(self) -> Tensor:
        """The packed rows (N, ...), as `format` has them."""
        return self.buffers[self.format.name]

    @property
    def _packed_rows(self) -> int:
        return self.packed.shape[0]

    @property
    def ntotal(self) -> int:
        """Rows, without deleted ones; while another call changes the index those before the change."""
        if self.versions.changing and (version := self.versions.last) is not None:
            return version.ntotal
        return self._packed_rows - self._updates.deleted_rows + self._updates.rows

    @property
    def nlist(self) -> int:
        """Number of lists: 1 for a flat index, 0 before training."""
        return max(0, self.buffers["list_offsets"].shape[0] - 1)

    @property
    def is_trained(self) -> bool:
        """Whether rows can be added."""
        return self.flat or self.buffers["centroids"].shape[0] > 0

    @property
    def grouped(self) -> bool:
        """Whether rows have groups."""
        return schema.GROUPS in self.buffers or self._updates.grouped

    @property
    def device(self) -> torch.device:
        """Where the rows are."""
        return self.buffers[self.format.name].device

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the vectors."""
        return self.format.vector_dtype(self.packed)

    @property
    def next_id(self) -> int:
        """The id that `add` gives next."""
        self.check()
        return int(self.buffers[schema.NEXT_ID])

    def require_trained(self, action: str) -> None:
        """Raise RuntimeError before training."""
        if not self.is_trained:
            raise RuntimeError(f"{action} needs a trained index: call train(x) first")

    def own_buffers(self) -> dict[str, Tensor]:
        """The buffers of the index that there are, by name."""
        return {name: self.buffers[name] for name in self.own if name in self.buffers}

    def memory_bytes(self) -> int:
        """Bytes of all buffers, of pending rows, and of what was derived from them so far."""
        with self.lock:
            total = sum(tensor.nbytes for tensor in self.buffers.values() if tensor is not None)
            version = self.versions.last
            return total + (version.packed.bytes if version else 0) + self._updates.bytes + self.ids.bytes

    # -- reading -------------------------------------------------------------------------------------------

    def segments(self, *, counted: bool = True) -> tuple[Coarse, list[InvertedLists]]:
        """The coarse quantizer, the packed lists and, if there are any, lists of the pending rows.

        `counted` says that the caller limits the number of rows: then the lists have no deleted rows. Otherwise they
        may have some, which are masked.
        """
        return self.versions.read(counted=counted).lists(counted=counted)

    def coarse(self) -> Coarse:
        """The coarse quantizer."""
        return self.versions.current().packed.derived().coarse

    @property
    def codes(self) -> CodesCache:
        """The codes of the packed lists that searches read."""
        return self.versions.codes

    def packed_lists(self) -> tuple[Tensor, Tensor, Tensor]:
        """Rows (N, ...), offsets (L + 1,) and ids (N,), with nothing pending."""
        with self.lock:
            self.pack()
            self.check()
            return self.packed, self.buffers["list_offsets"], self.buffers["list_ids"]

    def matches(self, wanted: Tensor) -> Matches:
        """The rows that carry one of the distinct ascending ids `wanted` (n,)."""
        with self.lock:
            self.check()
            rows, which = self.ids.rows(self.buffers, wanted)
            if self._updates.deleted is not None:
                kept = ~self._updates.deleted.mask[rows]
                rows, which = rows[kept], which[kept]
            return Matches(rows, which, *self._updates.find(wanted))

    def last_added(self, wanted: Tensor, *, groups: bool = False) -> Tensor:
        """The rows (n, ...) that were added last under the distinct ascending ids `wanted` (n,), or their groups (n,).

        KeyError for an unknown id.
        """
        with self.lock:
            if not few(self._updates.rows, self._updates.changes, self._packed_rows):
                self.pack()
            pending = self._updates.joined()[3 if groups else 0] if self._updates.rows else None
            stored = groups_in(self.buffers) if groups else self.packed
            return self.ids.latest(self.buffers, wanted, self.matches(wanted), stored, pending)

    # -- changing ------------------------------------------------------------------------------------------

    def add(
        self,
        rows: Tensor,
        ids: Tensor,
        assigned: Tensor,
        next_id: int,
        groups: Tensor | None = None,
        *,
        custom_ids: bool,
    ) -> None:
        """Add rows (n, ...) of this format, with ids (n,) and groups (n,), to the lists `assigned` (n,).

        Tensors are not copied.

        `custom_ids` says that other rows may have some of the ids.
        """
        with self.lock:
            if not rows.shape[0] and next_id == int(self.buffers[schema.NEXT_ID]):
                return
            self.put(next_id=torch.full_like(self.buffers[schema.NEXT_ID], next_id))
            self._updates.push(rows, ids, assigned, groups, custom_ids=custom_ids)
            self.unordered += rows.shape[0]
            if self._updates.rows >= max(self._packed_rows, 1):  # then adding copies O(n) rows in all
                self.pack()

    def delete(self, rows: Matches) -> int:
        """Delete rows and return their number. The caller holds `lock` since it got them from `matches`."""
        if rows.rows:
            self._updates.remove(rows.pending)
            self._updates.delete(rows.packed, self._packed_rows)
            self.new_version()
        if many_deleted(self._updates.deleted_rows, self._packed_rows):
            self.pack()
        return rows.rows

    def pack(self) -> None:
        """Write pending rows into the packed lists, and take deleted ones out of them."""
        if self._updates:
            run_outside(self._pack)

    def _pack(self) -> None:
        with self.lock, torch.no_grad():
            updates = self._updates
            if not updates:  # another thread has packed
                return
            self.check()
            self.replace_lists(*repacked(self.buffers, self.packed, updates, self.ids))
            self._updates = PendingUpdates()

    def replace_lists(self, packed: Tensor, offsets: Tensor, ids: Tensor, groups: Tensor | None = None) -> None:
        """Replace the packed lists: rows (N, ...), offsets (L + 1,), ids (N,), groups (N,) sorted within each list."""
        self.ids.forget_order()
        self.put(**{self.format.name: packed}, list_offsets=offsets, list_ids=ids, list_groups=groups)
        self.ordering = self.ordering if groups is None else "none"

    def exchange(self, buffers: dict[str, Tensor]) -> None:
        """Replace all buffers, and discard pending updates."""
        with self.lock:
            self._updates, self.ids, self.unordered = PendingUpdates(), IdLookup(), 0
            self.put(**{schema.GROUPS: None, **buffers})

    def put(self, **tensors: Tensor | None) -> None:
        """Replace buffers by name; None removes one."""
        written = [name for name in schema.INTEGERS if name in tensors]
        with self.lock:
            if 0 < len(written) < len(schema.INTEGERS):
                self.check()  # the integer buffers that stay
            self.buffers.update({name: tensor for name, tensor in tensors.items() if tensor is not None})
            for name in [name for name, tensor in tensors.items() if tensor is None]:
                self.buffers.pop(name, None)
            self.versions.wrote(tensors)
            if written:
                self._integrity.put(self.buffers)
            self.new_version()

    def new_version(self) -> None:
        """Mark graphs of the index as outdated: call it after every change."""
        with self.lock:
            self.version.changed = self.versions.changing = True
            self.version, self.graph, self.handed_out = VersionToken(), None, {}

    def _forget_derived(self) -> None:
        self.versions.forget()
        self.ids.forget_order()

    def hand_out(self) -> dict[str, Tensor]:
        """The buffers, packed, for code outside the index, which may write to them."""
        with self.lock:
            self.pack()
            self._integrity.hand_out(self.buffers)
            if all(type(self.buffers.get(name)) is Tensor for name in self.names):
                self.handed_out = {name: self.buffers[name] for name in self.names}
        return self.buffers

    def check(self, *, values: bool = True) -> None:
        """RuntimeError if the integer buffers have values that the index has not written or, with `values`, none."""
        if values:
            refuse_without_values(self.buffers)
        with self.lock:
            if self._integrity.check(self.buffers, self.format, flat=self.flat):
                self._forget_derived()
                self.ids.last_places = {}
                self.new_version()

    def about_to_move(self) -> dict[str, Tensor]:
        """Discard what is derived from the buffers, before they are moved or cast, and return them."""
        self.hand_out()
        self.graph = None
        self._forget_derived()
        return self.own_buffers()

    def moved(self) -> None:
        """After all buffers were moved or cast by a function that may have changed the integer ones."""
        self.handed_out = {}  # frees the tensors from before
        self.versions.forget()
        self._integrity.moved(self.buffers)
