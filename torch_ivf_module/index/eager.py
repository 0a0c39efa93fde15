"""Keeping methods of an index out of compiled and recorded graphs, or refusing to be recorded.

torch.compile would break its graph at each read of a value and specialize the pieces to the sizes of the first call;
torch.jit.trace and torch.export would record the operations of one call as those of every call.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NoReturn, ParamSpec, TypeVar

import torch
from torch import Tensor, nn

from .._torch_internals import dispatch_recorder, is_tracing, not_compiled
from ..functional.transforms import refuse_transform
from .integrity import refuse_without_values

_UNCHANGED = nullcontext()
P = ParamSpec("P")
R = TypeVar("R")
_UNTRACED = "of the methods of an index, search, search_and_reconstruct and forward can be part of a compiled graph"


def opaque(method: Callable[P, R]) -> Callable[P, R]:
    """`method` as one call that torch.compile does not trace.

    torch.compiler.disable would import the compiler, which takes longer than most searches. Before other code has
    imported it, nothing can be compiled.
    """
    disabled = not_compiled(method, _UNTRACED)

    @functools.wraps(method)
    def called(*args: P.args, **kwargs: P.kwargs) -> R:
        return (disabled if "torch._dynamo" in sys.modules else method)(*args, **kwargs)

    return called


def eager(method: Callable[P, R]) -> Callable[P, R]:
    """`opaque`, for methods that change an index or read it without a query.

    They raise RuntimeError inside a torch.func transform, while a graph is recorded, and if the index has no values.
    """

    @functools.wraps(method)
    def checked(*args: P.args, **kwargs: P.kwargs) -> R:
        refuse_transform(method.__name__)
        refuse_without_values(vars(args[0])["_buffers"])
        refuse_recording(method.__name__)
        return method(*args, **kwargs)

    return opaque(checked)


def without_autocast(device: torch.device) -> AbstractContextManager[object]:
    """A context without autocast, so that scores are float32."""
    return torch.autocast(device.type, enabled=False) if autocasts(device) else _UNCHANGED


def autocasts(device: torch.device) -> bool:
    """Whether autocast is on for operations of this device."""
    known = device.type == "cpu" or torch.amp.is_autocast_available(device.type)
    return known and torch.is_autocast_enabled(device.type)


def refuse_recording(action: str) -> None:
    """RuntimeError while torch.jit.trace, torch.export, torch.onnx.export or make_fx records a model.

    They would record the operations of one batch, with values read from the index as constants.
    """
    refuse_tracing(action, exporting=torch.compiler.is_exporting())


def refuse_tracing(action: str, *, exporting: bool = False) -> None:
    """`refuse_recording` for what torch.export can record."""
    if exporting or dispatch_recorder() is not None or is_tracing():
        raise RuntimeError(
            f"{action} of an index cannot be recorded by torch.jit.trace, torch.export and the like: call it outside "
            "of the model that is recorded, in which a search is the module that index.graph(...) returns; see "
            "torch_ivf_module.export for writing files"
        )


def refuse_scripting(index: nn.Module) -> NoReturn:
    """The `__prepare_scriptable__` of indexes, which torch.jit.script calls: RuntimeError."""
    raise RuntimeError(
        f"torch.jit.script cannot compile {type(index).__name__}: put the module that index.graph(...) returns in its "
        "place, and see torch_ivf_module.export.to_torchscript for writing files"
    )


def recorded_by_fx(module: nn.Module, x: Any) -> tuple[Tensor, Tensor] | None:
    """``module(x)`` as one node of the graph that torch.fx records if x is a Proxy, else None."""
    if not isinstance(x, torch.fx.Proxy):
        return None
    name = x.tracer.path_of_module(module)  # type: ignore[attr-defined]
    if not name:
        raise TypeError(
            f"{type(module).__name__} is one step for torch.fx: trace a module that holds it, or index.graph(...)"
        )
    found: Any = x.tracer.create_proxy("call_module", name, (x,), {})
    return found[0], found[1]
