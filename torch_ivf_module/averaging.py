"""Averages of a model's weights over training, for models that hold an index."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import nn
from torch.optim import swa_utils

from .graph import SearchGraph
from .index.base import IndexBase
from .index.integrity import Sources, sources_of, unchanged


class AveragedModel(swa_utils.AveragedModel):
    """torch.optim.swa_utils.AveragedModel for a model that contains indexes: weights are averaged, indexes are copied.

    torch's class averages or copies every buffer in place. With ``use_buffers=True`` it would average ids and offsets,
    which gives wrong ones, and it cannot copy an index whose size has changed. Here each index of the average gets the
    complete state of the index in the model, whenever that has changed.

    Parameters and buffers that a subclass adds to an index are averaged. Arguments are those of torch's class. Raises
    TypeError for a model that is itself an index without parameters, ValueError if the model and the average no longer
    have indexes at the same names.

    >>> import torch
    >>> from torch_ivf_module import IndexFlatL2
    >>> model = nn.Sequential(nn.Linear(2, 2), IndexFlatL2(2))
    >>> average = AveragedModel(model, multi_avg_fn=swa_utils.get_ema_multi_avg_fn(0.9), use_buffers=True)
    >>> model[1].add(torch.eye(2))
    >>> average.update_parameters(model)
    >>> average.module[1].ntotal
    2
    """

    def __init__(self, model: nn.Module, *args: Any, **settings: Any) -> None:
        if isinstance(model, IndexBase) and next(model.parameters(), None) is None:
            raise TypeError("model must be a module that contains an index: an index itself has no weights")
        super().__init__(model, *args, **settings)
        self._followed: dict[str, Sources] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_followed": {}}  # which holds the buffers of another model

    def update_parameters(self, model: nn.Module) -> None:
        """Update the average with the weights of `model`, and copy its indexes."""
        mine, theirs = _indexes(self.module), _indexes(model)
        if mine.keys() != theirs.keys():
            raise ValueError(f"model must have indexes at {sorted(mine)}, as when wrapped, got {sorted(theirs)}")
        with _without_own_buffers(self.module), _without_own_buffers(model):
            super().update_parameters(model)
        for name, index in theirs.items():
            held = index.store.hand_out()
            buffers = {own: held[own] for own in index.store.saved if own in held}
            if not unchanged(self._followed.get(name, {}), buffers):
                mine[name].load_state_dict(buffers, strict=False)
                self._followed[name] = sources_of(buffers, buffers)


def _indexes(model: nn.Module) -> dict[str, IndexBase]:
    """The indexes of a model by name; one that has several places has several names."""
    modules = model.named_modules(remove_duplicate=False)
    return {name: module for name, module in modules if isinstance(module, IndexBase)}


@contextmanager
def _without_own_buffers(model: nn.Module) -> Iterator[None]:
    """Hide the buffers of indexes and of graphs made of them, which hold copies of ids too."""
    with ExitStack() as stack:
        for module in model.modules():
            if isinstance(module, IndexBase):
                stack.enter_context(module.without_own_buffers())
            elif isinstance(module, SearchGraph):
                stack.callback(setattr, module, "_buffers", module._buffers)
                module._buffers = {}
        yield
