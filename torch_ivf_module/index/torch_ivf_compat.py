"""Names that torch-ivf's indexes have and that are of no other use here; see docs/from-torch-ivf.md."""

from __future__ import annotations

from typing import Any, TypeVar

import torch
from torch import Tensor

from .fits import Fits

Self = TypeVar("Self", bound="TorchIvfNames")


class TorchIvfNames(Fits):
    """What any index of torch-ivf has."""

    def rocm(self: Self, device: torch.device | str | int | None = None) -> Self:
        """Move to a ROCm device, which torch calls "cuda". RuntimeError for a build of torch without ROCm."""
        if not torch.version.hip:
            raise RuntimeError("this build of PyTorch has no ROCm; use .cuda() or .to(device)")
        return self.to(torch.device("cuda" if device is None else device))

    def dml(self: Self, device: torch.device | str | int | None = None) -> Self:
        """Move to a DirectML device. RuntimeError for a build of torch that knows no device of that name."""
        try:
            target = torch.device("dml" if device is None else device)
        except RuntimeError as error:
            raise RuntimeError("PyTorch knows no device 'dml'; use .to(torch_directml.device())") from error
        return self.to(target)

    def train(self: Self, mode: bool | Tensor = True, **settings: Any) -> Self:
        """Fit the index to a tensor, as faiss's `train`; or switch the mode, as torch.nn.Module's.

        ``train(x, ...)`` is `fit`; ``train(True)`` and ``train(False)`` set the training flag. For torch-ivf's users
        `max_iter` is `niter`, and `batch_size` and `tol` are taken and do nothing.
        """
        if "max_iter" in settings:
            settings["niter"] = settings.pop("max_iter")
        rest = {name: value for name, value in settings.items() if name not in ("batch_size", "tol")}
        return super().train(mode, **rest)


class TorchIvfSettings:
    """Settings of torch-ivf's `IndexIVFFlat` that are kept and read by nothing.

    There the thresholds are part of the rule by which "auto" chooses; here the predicted cost of each mode decides.
    """

    approximate_mode: bool = False
    auto_search_avg_group_threshold: float = 8.0
    csr_small_batch_avg_group_threshold: float = 64.0


class TorchIvfFlatModes:
    """Settings of torch-ivf's flat indexes under the names they have here."""

    max_bytes: int

    @property
    def auto_matrix_bytes_threshold(self) -> int:
        """Another name of `max_bytes`."""
        return self.max_bytes

    @auto_matrix_bytes_threshold.setter
    def auto_matrix_bytes_threshold(self, value: int) -> None:
        self.max_bytes = value
