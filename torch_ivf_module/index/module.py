"""What torch.nn.Module does with the buffers of an index: casting them, loading them, hiding them from others.

N vectors, L lists, d dim.
"""

from __future__ import annotations

import warnings
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from .._arrays import finite_in_dtype
from . import schema
from .integrity import VersionToken
from .store import OWN_BUFFERS, ListStore

Contents = VersionToken  # its name in modules that were pickled before it had this one
SAVED = (*schema.NAMES, schema.NEXT_ID)
# What a pickle or a deepcopy of an index has of its store beside the buffers, which are packed then.
STORE_STATE = ("_version_token", "_latest", "_list_ordering", "_unordered")


def store_state(store: ListStore) -> dict[str, Any]:
    """The values of STORE_STATE."""
    values = store.version, store.ids.last_lists, store.ordering, store.unordered
    return dict(zip(STORE_STATE, values, strict=True))


def set_store_state(store: ListStore, state: Mapping[str, Any]) -> None:
    """Give a new store of unpickled or copied buffers the rest of its state."""
    store.version = state.get("_version_token") or VersionToken()
    store.ids.last_lists = state.get("_latest", {})
    store.ordering, store.unordered = state.get("_list_ordering", "none"), state.get("_unordered", 0)
    store.moved()  # so that a tensor put there later is told from a write to this one


def restore_dtypes(store: ListStore, before: Mapping[str, Tensor]) -> None:
    """After the buffers, which were `before`, have been moved or cast with their parent: keep centroids float32,
    integers int64 and packed rows in a storage dtype.

    ValueError if a row is out of the range of the dtype it was cast to; the rows then keep the dtype they had.
    """
    buffers = store.buffers
    for name, tensor in before.items():
        allowed = name == "packed_embeddings" and buffers[name].dtype in schema.STORAGE
        if not allowed and buffers[name].dtype != tensor.dtype:
            buffers[name] = tensor.to(buffers[name].device)
    store.moved()
    packed = buffers["packed_embeddings"]
    if packed.dtype not in (before["packed_embeddings"].dtype, torch.float32):
        try:
            finite_in_dtype(packed, "packed_embeddings")
        except ValueError:
            buffers["packed_embeddings"] = before["packed_embeddings"].to(packed.device)
            raise


@contextmanager
def without_own_buffers(store: ListStore) -> Iterator[None]:
    """Within it, the module of a store has only the buffers that are not the index's; the index must not be used."""
    with store.lock:
        buffers = store.hand_out()
        own = {name: buffers.pop(name) for name in OWN_BUFFERS}
        try:
            yield
        finally:
            others = dict(buffers)
            buffers.clear()
            buffers.update(own)
            buffers.update(others)


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


def load_buffers(
    index: nn.Module,
    store: ListStore,
    state_dict: Mapping[str, Any],
    prefix: str,
    local_metadata: Mapping[str, Any],
    strict: bool,
    missing_keys: list[str],
    error_msgs: list[str],
) -> None:
    """Take the buffers of an index, which are in its store, from a state_dict: all or none.

    The other arguments are those of ``nn.Module._load_from_state_dict``, which calls it.
    """
    given = {name: state_dict[prefix + name] for name in SAVED if prefix + name in state_dict}
    missing = [name for name in schema.NAMES if name not in given]
    if strict:
        missing_keys += [prefix + name for name in missing]
    wrong = None
    if not missing:
        wrong = misfit(given, local_metadata, index, store)
    elif len(missing) < len(schema.NAMES):
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


def misfit(
    given: Mapping[str, Any], metadata: Mapping[str, Any], index: nn.Module, store: ListStore
) -> str | None:
    """Why the tensors `given` by name cannot be the buffers of an index, or None if they can."""
    version = metadata.get("version")
    if version is not None and version > index._version:
        return f"the state has version {version}, this release reads up to {index._version}"
    for name, tensor in given.items():
        if not isinstance(tensor, Tensor):
            return f"{name} must be a tensor, got {type(tensor).__name__}"
    return schema.misfit(given, store.d, flat=store.flat)


def _take(store: ListStore, given: Mapping[str, Tensor], *, assign: bool) -> None:
    """Make a checked state the buffers: the tensors themselves with `assign`, else copies where the index is.

    Vectors that are copied are read anyway, and so are checked: ValueError for one that is not finite or does not fit
    the storage dtype. Those that are assigned may be larger than memory, in a mapped file.
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
            old = store.buffers[name]
            loaded[name] = tensor if assign else tensor.detach().to(old.device, old.dtype, copy=True)
        if not assign:
            finite_in_dtype(loaded["packed_embeddings"], "packed_embeddings")
        loaded["centroids"] = loaded["centroids"].float()
        if loaded["packed_embeddings"].dtype not in schema.STORAGE:
            loaded["packed_embeddings"] = loaded["packed_embeddings"].float()
        if store.ntotal:  # an empty index was told the order of the rows to come when it was made
            store.ordering = "none"
        store.exchange(loaded)
        if assign:
            store.hand_out()  # the caller has the tensors too
