"""GPUs: indexes are moved to them as modules of torch are, so they need no resources."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import Any

import torch

from .base import Index
from .extract import try_extract_index_ivf


class StandardGpuResources:
    """A placeholder: torch manages the memory of a GPU. Settings of memory are taken without effect."""

    def setTempMemory(self, size: int) -> None:
        """Nothing."""

    def noTempMemory(self) -> None:
        """Nothing."""

    def setPinnedMemory(self, size: int) -> None:
        """Nothing."""

    def setDefaultNullStreamAllDevices(self) -> None:
        """Nothing: the current stream of torch is used."""


class GpuClonerOptions:
    """Settings of a move. Every index stays in one copy on one device, in its own dtype, whatever they say."""

    useFloat16 = False
    useFloat16CoarseQuantizer = False
    usePrecomputed = False
    indicesOptions = 0
    verbose = False
    shard = False
    shard_type = 1


GpuMultipleClonerOptions = GpuClonerOptions


def get_num_gpus() -> int:
    """The number of GPUs that torch sees."""
    return torch.cuda.device_count()


def index_cpu_to_gpu(provider: Any, device: int, index: Index, options: Any = None) -> Index:
    """A copy of an index on the GPU number `device`, for arrays, and tensors of the CPU or of that GPU.

    RuntimeError if there is no such GPU.
    """
    if not 0 <= device < get_num_gpus():
        raise RuntimeError(f"device must be the number of a GPU, of which torch sees {get_num_gpus()}; got {device}")
    return _copied(index, torch.device("cuda", device))


def index_gpu_to_cpu(gpu_index: Index) -> Index:
    """A copy of an index on the CPU."""
    return _copied(gpu_index, torch.device("cpu"))


def index_cpu_to_gpu_multiple_py(
    resources: Iterable[Any], index: Index, co: Any = None, gpus: Iterable[int] | None = None
) -> Index:
    """`index_cpu_to_gpu` for the first of some GPUs: an index is on one device."""
    return index_cpu_to_gpus_list(index, co, gpus)


def index_cpu_to_gpus_list(index: Index, co: Any = None, gpus: Iterable[int] | None = None, ngpu: int = -1) -> Index:
    """`index_cpu_to_gpu` for the first of some GPUs: an index is on one device."""
    numbers = list(range(get_num_gpus())) if gpus is None else list(gpus)
    if not numbers:
        raise RuntimeError("there is no GPU that torch sees")
    return index_cpu_to_gpu(None, numbers[0], index)


def index_cpu_to_all_gpus(index: Index, co: Any = None, ngpu: int = -1) -> Index:
    """`index_cpu_to_gpu` for the first GPU: an index is on one device. RuntimeError if there is none."""
    return index_cpu_to_gpus_list(index, co, None, ngpu)


def _copied(index: Index, device: torch.device) -> Index:
    moved = copy.deepcopy(index)
    moved.plain.to(device)
    if ivf := try_extract_index_ivf(moved):
        ivf.quantizer.module.to(device)
    return moved
