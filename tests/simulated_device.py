"""A device without hardware: CPU tensors that report another device and refuse operations with plain ones.

`waits` lists the operations for which the host would wait for the device.
"""

from __future__ import annotations

from contextlib import contextmanager, nullcontext
from copy import deepcopy

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from torch_ivf_module import SearchParams

aten = torch.ops.aten

AWAY = torch.device("lazy", 0)


class Elsewhere(torch.Tensor):
    """A CPU tensor that reports another device."""

    inner: torch.Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, inner):
        made = torch.Tensor._make_wrapper_subclass(
            cls,
            inner.shape,
            strides=inner.stride(),
            storage_offset=inner.storage_offset(),
            dtype=inner.dtype,
            device=AWAY,
        )
        made.inner = inner
        return made

    def tolist(self):
        return self.cpu().tolist()

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        with OtherDevice():
            return func(*args, **(kwargs or {}))


class OtherDevice(TorchDispatchMode):
    """Runs operations on the simulated device, and refuses those that mix it with the CPU."""

    MOVES = (torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        tensors = []
        tree_map(
            lambda leaf: tensors.append(leaf) if isinstance(leaf, torch.Tensor) else None, (args, kwargs)
        )
        away = [tensor for tensor in tensors if isinstance(tensor, Elsewhere)]
        stray = [tensor for tensor in tensors if not isinstance(tensor, Elsewhere) and tensor.dim() > 0]
        if away and stray and func not in self.MOVES:
            raise RuntimeError(f"{func}: a tensor of shape {tuple(stray[0].shape)} is on the wrong device")
        device = kwargs.get("device")
        if device is not None and torch.device(device).type == AWAY.type:
            kwargs["device"] = torch.device("cpu")
            wrap = True
        else:
            wrap = bool(away) and device is None
        originals = {id(tensor.inner): tensor for tensor in away}
        args, kwargs = tree_map(
            lambda leaf: leaf.inner if isinstance(leaf, Elsewhere) else leaf, (args, kwargs)
        )
        out = func(*args, **kwargs)
        if not wrap:
            return out

        def outside(leaf):
            if not isinstance(leaf, torch.Tensor):
                return leaf
            return originals[id(leaf)] if id(leaf) in originals else Elsewhere(leaf)

        return tree_map(outside, out)


def away(tensor):
    return Elsewhere(tensor)


@pytest.fixture
def other_device(monkeypatch):
    # A search switches autocast off; torch has none for this device.
    known = torch.autocast
    monkeypatch.setattr(
        torch,
        "autocast",
        lambda kind, *args, **kwargs: nullcontext() if kind == AWAY.type else known(kind, *args, **kwargs),
    )
    with OtherDevice():
        yield


def back(tensor):
    assert isinstance(tensor, Elsewhere), "a result was left on the wrong device"
    return tensor.inner


def moved(index):
    return deepcopy(index)._apply(away)


# Operations whose result, or the size of it, a GPU has to hand to the host.
READS = {
    aten._local_scalar_dense.default,
    aten.nonzero.default,
    aten.masked_select.default,
    aten.bincount.default,
    aten.equal.default,
    aten._unique2.default,
    aten.unique_consecutive.default,
    aten.unique_dim.default,
}
INDEXING = (aten.index.Tensor, aten.index_put.default, aten.index_put_.default)


class Waits(TorchDispatchMode):
    """Notes the operations for which the host waits."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        if self._waits(func, args, kwargs, tensors):
            self.names.append(str(func))
        return func(*args, **kwargs)

    def _waits(self, func, args, kwargs, tensors):
        away = [tensor for tensor in tensors if isinstance(tensor, Elsewhere)]
        if func is aten._to_copy.default and kwargs.get("device") is not None:
            return torch.device(kwargs["device"]).type != args[0].device.type
        if func is aten.copy_.default:
            return args[0].device.type != args[1].device.type
        if not away:
            return False
        if func is aten.repeat_interleave.Tensor:
            return kwargs.get("output_size") is None
        if func in INDEXING:
            return any(index is not None and index.dtype in (torch.bool, torch.uint8) for index in args[1])
        return func in READS


@contextmanager
def waits():
    """The names of the operations in this context for which the host waits for the device, in order."""
    with Waits() as mode:
        yield mode.names


# Of searches whose waits are counted.
SETTINGS = {
    "plain": {},
    "mask": {"selector": torch.arange(2000) % 3 == 0},
    "ids": {"selector": torch.arange(0, 1500, 7)},
    "max_codes": {"max_codes": 300},
    "budget": {"candidate_budget": 200},
}


def counted_waits(index, queries, k, **params):
    """The waits of a second search, and its answer."""
    if "selector" in params:
        params["selector"] = away(params["selector"])
    index, queries, params = moved(index), away(queries), SearchParams(**params)
    index.search(queries, k, params=params)
    with waits() as names:
        D, I = index.search(queries, k, params=params)
    return names, (back(D), back(I))
