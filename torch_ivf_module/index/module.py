"""Methods of torch.nn.Module on the buffers of an index: casting, loading, pickling, and hiding the buffers.

N vectors, L lists, d dim.
"""

from __future__ import annotations

import warnings
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Set
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from . import row_format, schema
from .integrity import VersionToken
from .store import ListStore

if TYPE_CHECKING:
    from .base import IndexBase

Contents = VersionToken  # its name in modules that were pickled before it had this one
# The state of a store that a pickle or a deepcopy of an index contains in addition to the packed buffers.
STORE_STATE = ("_version_token", "_last_places", "_list_ordering", "_unordered")


def store_state(store: ListStore) -> dict[str, Any]:
    """The values of STORE_STATE."""
    values = store.version, store.ids.last_places, store.ordering, store.unordered
    return dict(zip(STORE_STATE, values, strict=True))


def set_store_state(store: ListStore, state: Mapping[str, Any]) -> None:
    """Restore the values of STORE_STATE in the new store of an unpickled or copied index."""
    store.version = state.get("_version_token") or VersionToken()
    store.ids.last_places = state.get("_last_places", {})
    store.ordering, store.unordered = state.get("_list_ordering", "none"), state.get("_unordered", 0)
    store.moved()  # tells a later in-place write from a replaced tensor


def restore_dtypes(store: ListStore, before: Mapping[str, Tensor]) -> None:
    """After ``nn.Module._apply`` cast centroids back to float32, integers to int64, and packed rows to a storage dtype.

    `before` are the buffers before the call. Raises ValueError if a row exceeds the range of the new dtype; the rows
    then keep the dtype they had.
    """
    buffers, rows = store.buffers, store.format.name
    for name, tensor in before.items():
        if name != rows and buffers[name].dtype != tensor.dtype:
            buffers[name] = tensor.to(buffers[name].device)
    try:
        buffers[rows] = store.format.recast(buffers[rows], before[rows])
    except ValueError:
        buffers[rows] = before[rows].to(buffers[rows].device)
        raise
    finally:
        store.moved()


@contextmanager
def without_own_buffers(store: ListStore) -> Iterator[None]:
    """A context in which the module has only buffers that are not the index's; the index must not be used in it."""
    with store.lock:
        buffers = store.hand_out()
        own = {name: buffers.pop(name) for name in store.own if name in buffers}
        try:
            yield
        finally:
            others = dict(buffers)
            buffers.clear()
            buffers.update(own)
            buffers.update(others)


def loaded_names(saved: tuple[str, ...], left_out: Set[str]) -> tuple[str, ...]:
    """The entries of a state_dict that an index takes, without those `left_out`; none without its required entries."""
    names = tuple(name for name in saved if name not in left_out)
    return () if names == (schema.GROUPS,) else names


@contextmanager
def own_loading(
    module: nn.Module, state_dict: Mapping[str, Any], prefix: str, *args: Any, names: tuple[str, ...]
) -> Iterator[dict[str, Any]]:
    """A context for ``nn.Module._load_from_state_dict`` of a module that loads the entries `names` itself.

    Calls the pre-hooks of `module`, and yields the state without these entries. In the context that method does not
    expect these entries, and calls no pre-hooks. `args` are its other arguments.
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


def load_buffers(
    index: IndexBase,
    state_dict: Mapping[str, Any],
    prefix: str,
    local_metadata: Mapping[str, Any],
    strict: bool,
    missing_keys: list[str],
    error_msgs: list[str],
) -> None:
    """Load the buffers of an index from a state_dict: all or none of them.

    The other arguments are those of ``nn.Module._load_from_state_dict``, which calls this.
    """
    store = index.store
    given = {name: state_dict[prefix + name] for name in store.saved if prefix + name in state_dict}
    missing = [name for name in store.names if name not in given]
    if strict:
        missing_keys += [prefix + name for name in missing]
    wrong = None
    if not missing:
        wrong = misfit(given, local_metadata, index)
    elif store.format.name in missing and (other := _other_rows(state_dict, prefix, store.format.name)):
        wrong = f"the state has {other}, this index stores {store.format.name}: load it into an index of its own class"
    elif len(missing) < len(store.names):
        wrong = f"the state lacks {', '.join(missing)}, and an index loads all of its buffers or none"
    if not missing and wrong is None:
        assign = bool(local_metadata.get("assign_to_params_buffers", False))
        if store.device.type == "meta" and not assign and not any(tensor.is_meta for tensor in given.values()):
            text = "an index on the meta device takes the shapes of a state, not its values: pass assign=True"
            warnings.warn(f"for {prefix}centroids and the other buffers: {text}", stacklevel=2)
        try:
            _take(store, given, assign=assign)
        except ValueError as error:
            wrong = str(error)
    if wrong:
        error_msgs.append(f"{prefix or type(index).__name__}: {wrong}; the index is unchanged")


def _other_rows(state_dict: Mapping[str, Any], prefix: str, own: str) -> str | None:
    """The name of rows of another format in a state, if it has such."""
    return next((name for name in row_format.NAMES if name != own and prefix + name in state_dict), None)


def misfit(given: Mapping[str, Any], metadata: Mapping[str, Any], index: IndexBase) -> str | None:
    """Why the tensors `given` by name cannot be the buffers of an index, or None if they can."""
    version = metadata.get("version")
    if version is not None and version > index._version:
        return f"the state has version {version}, this release reads up to {index._version}"
    for name, tensor in given.items():
        if not isinstance(tensor, Tensor):
            return f"{name} must be a tensor, got {type(tensor).__name__}"
    return schema.misfit(given, index.store.format, flat=index.store.flat)


def _take(store: ListStore, given: Mapping[str, Tensor], *, assign: bool) -> None:
    """Replace the buffers by those of a checked state: with `assign` by these tensors, else by copies on the device of
    the index.

    Copied vectors are checked: ValueError for one that is not finite or exceeds the storage dtype. Assigned vectors
    are not read, because they may be a mapped file that is larger than memory.
    """
    ids, number = given["list_ids"], given.get(schema.NEXT_ID)
    if number is None:
        number = torch.zeros((), dtype=torch.int64, device=ids.device)
    if not ids.is_meta and int(number) < (least := schema.next_id_after(ids)):
        number = torch.full_like(number, least)
    if not assign and store.device.type != "meta" and any(tensor.is_meta for tensor in given.values()):
        raise ValueError("the state is on the meta device and has no values to copy")
    with store.lock, torch.no_grad():
        loaded = {}
        for name, tensor in {**given, schema.NEXT_ID: number}.items():
            old = store.buffers.get(name, store.buffers["list_ids"])
            loaded[name] = tensor if assign else tensor.detach().to(old.device, old.dtype, copy=True)
        rows = store.format.name
        if not assign:
            store.format.check_values(loaded[rows])
        loaded["centroids"], loaded[rows] = loaded["centroids"].float(), store.format.adopted(loaded[rows])
        if store.ntotal:  # in an empty index it is the argument of the constructor, for the rows that are loaded
            store.ordering = "none"
        store.exchange(loaded)
        if assign:
            store.hand_out()  # the caller may write to the tensors
