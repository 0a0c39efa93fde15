"""A kernel for CPUs in C++: a whole search in one call, which stores no scores.

It is optional: without it, or for vectors that it does not support, PyTorch operations give the same results. The
environment variable TORCH_IVF_NATIVE=0 turns it off.
"""

from . import ops  # noqa: F401  registers the kernel
from .library import available, build, disabled, enabled, info

__all__ = ["available", "build", "disabled", "enabled", "info"]
