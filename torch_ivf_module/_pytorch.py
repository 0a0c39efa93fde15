"""Nothing here works without PyTorch: where it is missing, say how to get it.

It is no dependency of the distribution, for pip would choose a build of it by itself.
"""

try:
    import torch  # noqa: F401
except ModuleNotFoundError as error:
    if error.name != "torch":
        raise
    raise ImportError(
        "torch_ivf_module needs PyTorch, which is not installed: install the build that suits this machine "
        "(https://pytorch.org/get-started/locally), or pip's own choice with: pip install 'torch-ivf-module[pytorch]'",
        name="torch",
    ) from error
