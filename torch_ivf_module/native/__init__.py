"""A fused kernel for CPUs: the scan of inverted lists in C++, which stores no scores.

It does what a search does with PyTorch operations, and is only ever an addition: where it is not there or does not
serve, they answer. The environment variable TORCH_IVF_NATIVE=0 turns it off.
"""

from . import ops  # noqa: F401  registers the kernel
from .library import available, build, disabled, enabled, info

__all__ = ["available", "build", "disabled", "enabled", "info"]
