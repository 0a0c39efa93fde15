"""The buffers of an index: staging, caches, and what torch.nn.Module does with them.

N vectors, L lists, d dim.
"""

from __future__ import annotations

import threading
import warnings
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from .._arrays import finite_in_dtype
from ..functional import lists as ragged
from ..functional import metric as metrics
from ..functional.lists import InvertedLists, inverted_lists
from ..functional.probe import Coarse
from ..functional.transforms import run_outside, tracked, transforming, wrapped
from ..params import positive
from . import schema, validation
from .integrity import CHECKSUMS, Integrity, Sources, refuse_without_values, sources_of, unchanged
from .pending import PendingUpdates, few

Self = TypeVar("Self", bound="IndexModule")
_NOT_COPIED = ("_updates", "_integrity", "_derived", "_sorted", "_lock", "_own_graph")
_OWN = (*schema.NAMES, schema.NEXT_ID)
OWN_BUFFERS = (*_OWN, CHECKSUMS)


class Derived(NamedTuple):
    """What is computed from the buffers and never saved."""

    sources: Sources
    coarse: Coarse
    lists: InvertedLists


class VersionToken:
    """What an index holds at one time; whoever made something of it learns here that it has changed."""

    changed = False


Contents = VersionToken  # its name in modules that were pickled before it had this one


class IndexModule(nn.Module):
    """The state of an index as buffers, in whatever way a parent module, a checkpoint or a device moves them."""

    centroids: Tensor
    packed_embeddings: Tensor
    list_offsets: Tensor
    list_ids: Tensor
    next_id: Tensor

    _flat = False
    _version = 1

    def __init__(
        self, d: int, *, metric: str, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> None:
        super().__init__()
        dtype = torch.float32 if dtype is None else dtype
        if dtype not in validation.STORAGE:
            raise ValueError(f"dtype must be torch.float32, torch.float16 or torch.bfloat16, got {dtype}")
        self.d = positive(d, "d")
        self.metric = metrics.check_metric(metric)
        for name, tensor in schema.empty(d, flat=self._flat, device=device, dtype=dtype).items():
            self.register_buffer(name, tensor)
        self.register_buffer(CHECKSUMS, torch.zeros(3, dtype=torch.int64, device=device), persistent=False)
        self._latest: dict[int, int] = {}
        self._version_token = VersionToken()
        self._start_caches()
        self._integrity.put(self.__dict__["_buffers"])

    def _start_caches(self) -> None:
        self._updates = PendingUpdates()
        self._integrity = Integrity()
        self._derived: Derived | None = None
        self._sorted: tuple[Sources, Tensor] | None = None
        self._own_graph: Any = None
        self._lock = threading.RLock()

    @property
    def ntotal(self) -> int:
        """Vectors in the index."""
        return self._raw("packed_embeddings").shape[0] - self._updates.gone_rows + self._updates.rows

    @property
    def is_trained(self) -> bool:
        """Whether vectors can be added."""
        return self._flat or self._raw("centroids").shape[0] > 0

    def _require_trained(self, action: str) -> None:
        if not self.is_trained:
            raise RuntimeError(f"{action} needs a trained index: call train(x) first")

    @property
    def device(self) -> torch.device:
        """Where the vectors are."""
        return self._raw("packed_embeddings").device

    @property
    def dtype(self) -> torch.dtype:
        """The dtype vectors are stored in."""
        return self._raw("packed_embeddings").dtype

    @property
    def _nlist(self) -> int:
        return max(0, self._raw("list_offsets").shape[0] - 1)

    def _check_plain(self) -> None:
        """Raise RuntimeError if a buffer has no values, or if a derivative or a batch of it was asked for."""
        if transforming():
            for name in schema.NAMES:
                if wrapped(self._raw(name)):
                    raise RuntimeError(
                        f"{name} belongs to a torch.func transform, and a search has derivatives and batches of x "
                        "alone: leave the buffers of an index out of the arguments that grad, jvp or vmap transform; "
                        "state_dict() inside of the function makes such tensors too, so take it outside, or use "
                        "dict(model.named_buffers())"
                    )
        buffers = self.__dict__["_buffers"]
        if type(ids := buffers["list_ids"]) is not Tensor or ids.is_meta:
            refuse_without_values(buffers)
        for name in schema.FLOATS:
            if tracked(buffers[name]):
                raise RuntimeError(
                    f"{name} requires grad or is a dual tensor, but a search has derivatives with respect to x alone: "
                    "detach it"
                )

    # -- what is computed from the buffers -----------------------------------------------------------------

    def _segments(self, *, counted: bool = True) -> tuple[Coarse, list[InvertedLists]]:
        """What a search reads: the packed lists, and the rows that wait to be packed as a second set.

        Unless the sizes of the lists are `counted`, as a cap on rows does, removed rows may still be in them, as ones
        that are never found.
        """
        with self._lock:
            if counted and self._updates.gone_rows:
                self._pack()
            self._pack_many()
            derived = self._derive()
            segments = [self._updates.left(derived.lists)]
            if self._updates.rows:
                segments.append(self._updates.lists(self._nlist, derived.coarse.origin, self.metric))
            return derived.coarse, segments

    def check_buffers(self) -> None:
        """Raise RuntimeError if ids or offsets were overwritten by something else, as averaging weights does, or if
        they have no values, being on the meta device or made under FakeTensorMode.

        Whatever reads them calls this; it costs nothing unless somebody could have written to them since the last call.
        """
        refuse_without_values(self.__dict__["_buffers"])
        self._check_integers()

    def _check_integers(self) -> None:
        with self._lock:
            if self._integrity.check(self.__dict__["_buffers"], self.d, flat=self._flat):
                self._derived, self._sorted, self._latest = None, None, {}
                self._put()

    def _derive(self) -> Derived:
        self._check_integers()
        buffers, held = self.__dict__["_buffers"], self._derived
        if held is not None and unchanged(held.sources, buffers):
            return held
        with torch.no_grad():
            sources = sources_of(buffers, schema.NAMES)
            packed, offsets, ids = (buffers[name] for name in schema.NAMES[1:])
            coarse = self._coarse()
            bias = metrics.row_bias(packed, coarse.origin, self.metric)
            self._derived = Derived(sources, coarse, inverted_lists(packed, offsets, ids, bias))
        return self._derived

    def _coarse(self) -> Coarse:
        raise NotImplementedError

    def _id_order(self) -> Tensor:
        """What sorts the packed ids: (N,) rows. 8 bytes a row, made when a row is first looked for by its id."""
        self.check_buffers()
        buffers = self.__dict__["_buffers"]
        if self._sorted is None or not unchanged(self._sorted[0], buffers):
            self._sorted = sources_of(buffers, ["list_ids"]), torch.argsort(buffers["list_ids"], stable=True)
        return self._sorted[1]

    # -- buffers -------------------------------------------------------------------------------------------

    def _raw(self, name: str) -> Tensor:
        """A buffer as it is, waiting rows left out."""
        tensor: Tensor = self.__dict__["_buffers"][name]
        return tensor

    def _put(self, **tensors: Tensor) -> None:
        """Exchange buffers; whoever made something of the old ones is told."""
        written = [name for name in schema.INTEGERS if name in tensors]
        with self._lock:
            if 0 < len(written) < len(schema.INTEGERS):
                self.check_buffers()  # those that stay
            held = self.__dict__["_buffers"]
            held.update(tensors)
            if written:
                self._integrity.put(held)
            self._version_token.changed = True
            self._version_token, self._own_graph = VersionToken(), None

    def _exchange(self, tensors: dict[str, Tensor]) -> None:
        """Put all buffers there anew and forget what was pending, or known of the old ones."""
        self._updates, self._latest = PendingUpdates(), {}
        self._derived, self._sorted = None, None
        self._put(**tensors)

    # Whoever reads the buffers, a parent's state_dict or .buffers() included, comes through one of these two.

    @property
    def _buffers(self) -> dict[str, Tensor | None]:
        self._hand_out()
        held: dict[str, Tensor | None] = self.__dict__["_buffers"]
        return held

    @_buffers.setter
    def _buffers(self, held: dict[str, Tensor | None]) -> None:
        self.__dict__["_buffers"] = held

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value)
        if name in schema.NAMES:
            self._put()

    def __getattr__(self, name: str) -> Any:
        if name in OWN_BUFFERS:
            self._hand_out()
        return super().__getattr__(name)

    @contextmanager
    def without_own_buffers(self) -> Iterator[None]:
        """Within it, this module has only the buffers that are not the index's; nothing may be done with the index."""
        with self._lock:
            held = self._buffers
            own = {name: held.pop(name) for name in OWN_BUFFERS}
            try:
                yield
            finally:
                rest = dict(held)
                held.clear()
                held.update(own)
                held.update(rest)

    def _hand_out(self) -> None:
        """Pack, for somebody else reads the buffers now, and may write to them."""
        self._pack()
        if "_integrity" in self.__dict__:
            with self._lock:
                self._integrity.hand_out(self.__dict__["_buffers"])

    def _packed(self) -> tuple[Tensor, Tensor, Tensor]:
        """Vectors, offsets and ids for the index's own use."""
        with self._lock:
            self._pack()
            self.check_buffers()
            packed, offsets, ids = (self._raw(name) for name in schema.NAMES[1:])
            return packed, offsets, ids

    def _pack(self) -> None:
        """Take the removed rows out of the buffers and the waiting ones in."""
        staging = self.__dict__.get("_updates")
        if staging is not None and staging.pending:
            run_outside(self._pack_pending)

    def _pack_pending(self) -> None:
        with self._lock, torch.no_grad():
            staging = self._updates
            if not staging.pending:  # another thread was first
                return
            self.check_buffers()
            packed, offsets, ids = (self._raw(name) for name in schema.NAMES[1:])
            if staging.gone is not None:
                packed, offsets, ids = ragged.keep_rows(packed, offsets, ids, ~staging.gone)
            if staging.rows:
                self._note_latest(ids)
                packed, offsets, ids = ragged.append(packed, offsets, ids, *staging.joined())
            self._replace(packed, offsets, ids)
            self._updates = PendingUpdates()

    def _pack_many(self) -> None:
        """Pack if more rows wait than are cheap to read apart."""
        if not few(self._updates.rows, self._raw("packed_embeddings").shape[0]):
            self._pack()

    def _note_latest(self, held: Tensor) -> None:
        """Remember the list of the last added row of each id that is now there more than once.

        Rows of one list are in the order they came, but those of different lists are not. A file does not keep
        this, so a loaded index takes the last row there is.
        """
        if self._updates.custom_ids:
            _, ids, assigned = self._updates.joined()
            values, counts = torch.unique(torch.cat([held, ids]), return_counts=True)
            again = torch.isin(ids, values[counts > 1])
            self._latest.update(zip(ids[again].tolist(), assigned[again].tolist(), strict=True))

    def _replace(self, packed: Tensor, offsets: Tensor, ids: Tensor) -> None:
        self._derived, self._sorted = None, None  # which would keep the old buffers alive
        self._put(packed_embeddings=packed, list_offsets=offsets, list_ids=ids)

    def _apply(self: Self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        # Centroids stay float32, vectors in a storage dtype and numbers integers, whatever the parent is cast to.
        self._hand_out()
        self._own_graph = self._derived = self._sorted = None
        before = {name: self._raw(name) for name in OWN_BUFFERS}
        super()._apply(fn, recurse)
        held = self.__dict__["_buffers"]
        for name, tensor in before.items():
            stays = tensor.dtype if name != "packed_embeddings" or held[name].dtype not in validation.STORAGE else None
            if stays is not None and held[name].dtype != stays:
                held[name] = tensor.to(held[name].device)
        self._integrity.moved(held)
        cast = held["packed_embeddings"]
        if cast.dtype not in (before["packed_embeddings"].dtype, torch.float32):
            try:
                finite_in_dtype(cast, "packed_embeddings")
            except ValueError:
                held["packed_embeddings"] = before["packed_embeddings"].to(cast.device)
                raise
        return self

    def __getstate__(self) -> dict[str, Any]:
        self._hand_out()
        return {k: v for k, v in self.__dict__.items() if k not in _NOT_COPIED}

    def __setstate__(self, held: dict[str, Any]) -> None:
        super().__setstate__({"_version_token": VersionToken(), **held})
        self._start_caches()
        self._integrity.moved(self.__dict__["_buffers"])  # so that a tensor put there later is told from a write

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
        """Take over a state of any size, or none of it; whatever else the module holds loads as in any module.

        A parent's load_state_dict calls this, at any depth.
        """
        args = (local_metadata, strict, missing_keys, unexpected_keys, error_msgs)
        names = tuple(name for name in _OWN if name not in self._non_persistent_buffers_set)
        with own_loading(self, state_dict, prefix, *args, names=names) as rest:
            if names:
                self._load_own(state_dict, prefix, local_metadata, strict, missing_keys, error_msgs)
            super()._load_from_state_dict(rest, prefix, *args)

    def _load_own(
        self,
        state_dict: Mapping[str, Any],
        prefix: str,
        local_metadata: Mapping[str, Any],
        strict: bool,
        missing_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        """The part of `_load_from_state_dict` that loads the buffers of the index."""
        given = {name: state_dict[prefix + name] for name in _OWN if prefix + name in state_dict}
        lost = [name for name in schema.NAMES if name not in given]
        if strict:
            missing_keys += [prefix + name for name in lost]
        wrong = None
        if not lost:
            wrong = self._refuses(given, local_metadata)
        elif len(lost) < len(schema.NAMES):
            wrong = f"the state lacks {', '.join(lost)}, and an index loads whole or not at all"
        if not lost and wrong is None:
            assign = bool(local_metadata.get("assign_to_params_buffers", False))
            if self.device.type == "meta" and not assign and not any(tensor.is_meta for tensor in given.values()):
                text = "an index on the meta device takes the shapes of a state, not its values: pass assign=True"
                warnings.warn(f"for {prefix}centroids and the other buffers: {text}", stacklevel=2)
            try:
                self._take(given, assign=assign)
            except ValueError as error:
                wrong = str(error)
        if wrong:
            error_msgs.append(f"{prefix or type(self).__name__}: {wrong}; the index is left as it was")

    def _refuses(self, given: Mapping[str, Any], metadata: Mapping[str, Any]) -> str | None:
        version = metadata.get("version")
        if version is not None and version > self._version:
            return f"the state has version {version}, this release reads up to {self._version}"
        for name, tensor in given.items():
            if not isinstance(tensor, Tensor):
                return f"{name} must be a tensor, got {type(tensor).__name__}"
        return schema.misfit(given, self.d, flat=self._flat)

    def _take(self, given: Mapping[str, Tensor], *, assign: bool) -> None:
        """Make a checked state this index's own: as it is with `assign`, else as copies where this index is.

        Vectors that are copied are read anyway, and so looked at: ValueError for one that is not finite or does not
        fit the storage dtype. Those that are assigned may be larger than memory, in a mapped file.
        """
        ids, number = given["list_ids"], given.get(schema.NEXT_ID)
        if number is None:
            number = torch.zeros((), dtype=torch.int64, device=ids.device)
        if not ids.is_meta and int(number) < (least := schema.next_id_after(ids)):
            number = torch.full_like(number, least)
        if not assign and self.device.type != "meta" and any(tensor.is_meta for tensor in given.values()):
            raise ValueError("the state is on the meta device and has no values to copy")
        with self._lock, torch.no_grad():
            fresh = {}
            for name, tensor in {**given, schema.NEXT_ID: number}.items():
                old = self._raw(name)
                fresh[name] = tensor if assign else tensor.detach().to(old.device, old.dtype, copy=True)
            if not assign:
                finite_in_dtype(fresh["packed_embeddings"], "packed_embeddings")
            fresh["centroids"] = fresh["centroids"].float()
            if fresh["packed_embeddings"].dtype not in validation.STORAGE:
                fresh["packed_embeddings"] = fresh["packed_embeddings"].float()
            self._exchange(fresh)
            if assign:
                self._hand_out()  # the caller has the tensors too


@contextmanager
def own_loading(
    module: nn.Module, state_dict: Mapping[str, Any], prefix: str, *args: Any, names: tuple[str, ...]
) -> Iterator[dict[str, Any]]:
    """Call the hooks that come before loading `module`, then let torch load everything but the entries `names`.

    Within it, ``nn.Module._load_from_state_dict`` of the yielded state does not look for `names` and calls no hooks;
    `args` are its other arguments.
    """
    hooks, unsaved = module._load_state_dict_pre_hooks, module._non_persistent_buffers_set
    for hook in hooks.values():
        hook(state_dict, prefix, *args)
    module._load_state_dict_pre_hooks = OrderedDict()
    module._non_persistent_buffers_set = unsaved | set(names)
    try:
        own = {prefix + name for name in names}
        yield {key: value for key, value in state_dict.items() if key not in own}
    finally:
        module._load_state_dict_pre_hooks, module._non_persistent_buffers_set = hooks, unsaved
