"""A scan for accelerators in Triton. Nothing has been measured on one yet, so it is used with TORCH_IVF_TRITON=1 only.

Triton is imported by the first such search. Without the scan, PyTorch operations give the same results.
"""

from . import scan  # noqa: F401  registers it
