"""Averages of a model's weights over training, for models that hold an index."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn
from torch.optim import swa_utils

from .index.base import IndexBase
from .index.module import Sources, same, version_of


class AveragedModel(swa_utils.AveragedModel):
    """torch.optim.swa_utils.AveragedModel for a model that holds indexes: weights are averaged, indexes followed.

    The class of torch averages or copies every buffer in place, entry by entry. Ids and offsets cannot be averaged
    (with ``use_buffers=True`` they are, and rounded), and vectors that were added later have no place to be copied to.
    Here each index of the average takes the whole state of its counterpart whenever that has changed.

    Arguments as there. Raises TypeError for a model that is an index itself, ValueError when the two no longer hold
    indexes in the same places.

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
        if isinstance(model, IndexBase):
            raise TypeError("model must hold an index, not be one: an index has no weights to average")
        super().__init__(model, *args, **settings)
        self._followed: dict[str, Sources] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_followed": {}}  # which holds the buffers of another model

    def update_parameters(self, model: nn.Module) -> None:
        """Average the weights of `model` in, and follow its indexes."""
        with _without_indexes(self.module) as mine, _without_indexes(model) as theirs:
            super().update_parameters(model)
        if mine.keys() != theirs.keys():
            raise ValueError(f"model must hold its indexes at {sorted(mine)}, as at first, got {sorted(theirs)}")
        for name, index in theirs.items():
            held = [(buffer, version_of(buffer)) for buffer in index.buffers()]
            if not same(held, self._followed.get(name, [])):
                mine[name].load_state_dict(index.state_dict())
                self._followed[name] = held


@contextmanager
def _without_indexes(model: nn.Module) -> Iterator[dict[str, IndexBase]]:
    """`model` with a module that has no state in the place of each index; yields the indexes by name."""
    modules = model.named_modules(remove_duplicate=False)  # an index may have several places
    found = {name: module for name, module in modules if isinstance(module, IndexBase)}
    places = {name: model.get_submodule(name.rpartition(".")[0])._modules for name in found}
    for name, children in places.items():
        children[name.rpartition(".")[2]] = nn.Identity()
    try:
        yield found
    finally:
        for name, children in places.items():
            children[name.rpartition(".")[2]] = found[name]
