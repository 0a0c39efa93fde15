"""A fused kernel for CPUs: the scan of inverted lists in C++, which stores no scores. Built on the machine it runs on.

It is the strategy "native" beside those of PyTorch operations, finds what they find, and is only ever an addition:
where it is not built, cannot be, or does not serve, PyTorch operations answer. The environment variable
TORCH_IVF_NATIVE=0 keeps it out.
"""

from .library import available, build, enabled, prepare
from .strategy import exact_scores, scan, serves

__all__ = ["available", "build", "enabled", "exact_scores", "prepare", "scan", "serves"]
