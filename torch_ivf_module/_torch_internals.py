"""All that is used of PyTorch beside its public interface; tests/test_torch_internals.py says what for."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import torch
from torch._C import _are_functorch_transforms_active as transforms_active
from torch._C import _AutoDispatchBelowAutograd as below_autograd
from torch._C import _is_tracing as is_tracing
from torch._C._dynamo.eval_frame import get_eval_frame_callback as compiler_active
from torch._C._functorch import is_functorch_wrapped_tensor as is_transformed
from torch._compile import _disable_dynamo
from torch.utils._python_dispatch import _disable_current_modes as outside_of_modes

__all__ = [
    "MKLDNN_LAYOUT",
    "below_autograd",
    "compiler_active",
    "dispatch_recorder",
    "is_tracing",
    "is_transformed",
    "not_compiled",
    "outside_of_modes",
    "transforms_active",
]

P = ParamSpec("P")
R = TypeVar("R")

MKLDNN_LAYOUT: torch.layout = torch._mkldnn  # type: ignore[attr-defined]

# What records operations as they are dispatched (make_fx, torch.export, torch.func.linearize), None if nothing does.
dispatch_recorder: Callable[[], object] = functools.partial(
    torch._C._get_dispatch_mode,
    torch._C._TorchDispatchModeKey.PROXY,
)


def not_compiled(method: Callable[P, R], reason: str) -> Callable[P, R]:
    """`method` as one step of torch.compile, which gives the reason where it may not break its graph there.

    As torch.compiler.disable, which would import the compiler at once: this does so when it is first called.
    """
    method._torchdynamo_disable, method._torchdynamo_disable_msg = True, reason  # type: ignore[attr-defined]
    disabled: Callable[P, R] = _disable_dynamo(method)
    return disabled
