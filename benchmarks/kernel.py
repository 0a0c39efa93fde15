"""The native kernel of this library: built before anything is timed, and disabled for the PyTorch engines."""

import os
from collections.abc import Iterator
from contextlib import contextmanager

from torch_ivf_module import native

_SWITCH = "TORCH_IVF_NATIVE"


@contextmanager
def disabled() -> Iterator[None]:
    """Searches inside use PyTorch operations only. For the whole process, not for one thread."""
    before = os.environ.get(_SWITCH, "1")
    os.environ[_SWITCH] = "0"
    try:
        yield
    finally:
        os.environ[_SWITCH] = before


def prepare() -> bool:
    """Build the kernel if it is missing, or else disable it for good: whether there is one.

    Otherwise a large search would start a build in the background, beside what is being timed.
    """
    if native.enabled() and not native.available():
        try:
            print("building the native kernel, once")
            native.build()
        except RuntimeError as error:
            print(f"without the native kernel: {error}")
            os.environ[_SWITCH] = "0"
    return bool(native.available())
