"""``python -m torch_ivf_module.native``: builds the kernel, in a process of its own.

Torch loads what it has just built, and what is loaded cannot be moved to where it belongs and loaded again.
"""

from __future__ import annotations

import os
import sys

from .compiling import BuildError, build_kernel

if hasattr(os, "nice") and "--background" in sys.argv:
    os.nice(10)  # whoever started this is at work
try:
    print(build_kernel(again="--again" in sys.argv))
except (BuildError, OSError) as error:
    print(error, file=sys.stderr)
    raise SystemExit(1) from None
