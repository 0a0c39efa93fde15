"""Optional packages: imported where they are used, and named clearly where they are missing."""

from __future__ import annotations

import importlib
from types import ModuleType

__all__ = ["require"]


def require(module: str, extra: str) -> ModuleType:
    """Import an optional package, or say which extra brings it.

    Args:
        module: what to import; dots are allowed (``"safetensors.torch"``).
        extra: the extra of this distribution that installs it.

    Returns:
        The imported module.

    Raises:
        ImportError: the package is not installed (the message names the extra), or it is installed but
            fails while being imported (its own error, untouched: installing it again would not help).

    Example:
        >>> require("math", extra="test").sqrt(4.0)
        2.0
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        package = module.partition(".")[0]
        if error.name is None or error.name.partition(".")[0] != package:
            raise
        raise ImportError(
            f"{package} is needed here and is not installed; it comes with: pip install 'torch-ivf-module[{extra}]'",
            name=package,
        ) from error
