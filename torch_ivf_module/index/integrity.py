"""Whether the integer buffers of an index have the values that the index wrote.

Offsets and ids may be copied and moved, but not averaged or rounded, which averages of weights do with every buffer of
a model. So their checksums are kept in a buffer, which is not saved: code that copies all buffers
(DistributedDataParallel, torch's AveragedModel with ``use_buffers=False``) copies it too, and it still matches; after
averaging it does not.

The buffers are checked only if other code could have written to them: if torch counted an in-place write, if a buffer
is another tensor than before, or if a buffer was read from outside the index (``tensor.data.copy_`` is not counted by
torch, but its caller must have read the tensor). N vectors, L lists.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from . import schema
from .row_format import RowFormat

CHECKSUMS = "checksums"
_PART = 1 << 16  # entries between two multiplications of the sum; the value of a checksum depends on it
# Entries read at a time. For more than 2^15 torch starts a second thread, and on a busy processor two threads took
# 640 ms for half a million ids instead of 2.
_PIECE = 1 << 15
_FACTOR = -7046029254386353131  # odd, 2^64 over the golden ratio as a signed number: products spread over all bits

_REMEDY = (
    "Something else wrote into the buffers of the index. Averaging weights does so with use_buffers=True (the default "
    "of Lightning's WeightAveraging): use torch_ivf_module.AveragedModel, or use_buffers=False. "
    "DistributedDataParallel does so where the ranks hold different numbers of vectors: call "
    "torch_ivf_module.ignore_in_ddp(model) before wrapping it. After to_empty() call "
    "reset_parameters(); after reading a checkpoint into the buffers call load_state_dict(). Either of these makes the "
    "index usable again"
)

# Tensors by name, each with its count of in-place writes when it was read, -1 if torch does not count them.
Sources = dict[str, tuple[Tensor, int]]


def sources_of(buffers: Mapping[str, Tensor], names: Iterable[str]) -> Sources:
    """The buffers of these names, with their counts of writes."""
    read = {name: buffers[name] for name in names}
    return {name: (tensor, -1 if tensor.is_inference() else tensor._version) for name, tensor in read.items()}


def unchanged(sources: Sources, buffers: Mapping[str, Tensor]) -> bool:
    """Whether the buffers are the tensors of `sources`, and not written to since. False if there are no sources."""
    for name, (tensor, version) in sources.items():
        now = buffers.get(name)
        if now is not tensor or (version >= 0 and now._version != version):
            return False
    return bool(sources)


def untouched(sources: Sources) -> bool:
    """Whether the tensors of `sources` were not written to since, whether or not they are still the buffers."""
    return all(version < 0 or tensor._version == version for tensor, version in sources.values())


def refuse_without_values(buffers: Mapping[str, Tensor]) -> None:
    """RuntimeError if the integer buffers have no values: on the meta device, or made under FakeTensorMode."""
    for name in schema.integers(buffers):
        if _has_no_values(buffers[name]):
            where = "on the meta device" if buffers[name].is_meta else "a FakeTensor"
            raise RuntimeError(
                f"the index has no values, {name} being {where}: call load_state_dict(state, assign=True), or "
                "to_empty(device=...) and reset_parameters()"
            )


def _has_no_values(tensor: Tensor) -> bool:
    return tensor.is_meta or type(tensor).__name__ == "FakeTensor"


def checksums(buffers: Mapping[str, Tensor]) -> Tensor:
    """Checksums (3,) int64 of the integer buffers, (4,) with groups, which depend on the order of their entries."""
    return torch.stack([_checksum(buffers[name].flatten()) for name in schema.integers(buffers)])


def _checksum(values: Tensor) -> Tensor:
    """A checksum () of values (n,) int64 that depends on the order of the entries.

    It is not linear: the average of two arrays does not have the average of their checksums.
    """
    places = torch.arange(min(_PART, values.shape[0]), device=values.device) * _FACTOR
    total = torch.full((), values.shape[0], dtype=torch.int64, device=values.device)
    for part in values.split(_PART):
        total = total * _FACTOR
        for piece, at in zip(part.split(_PIECE), places.split(_PIECE), strict=False):
            mixed = (piece ^ at[: piece.shape[0]]).mul_(_FACTOR)
            total += mixed.bitwise_xor_(mixed >> 29).sum()
    return total ^ _FACTOR  # so that buffers and checksum of zeros do not match


class VersionToken:
    """Identifies one version of an index. Graphs of that version keep the token."""

    changed = False  # set once the index has another version


class Integrity:
    """What is known of the integer buffers of one index. `buffers` are all buffers of the index, by name."""

    def __init__(self) -> None:
        self._sources: Sources = {}  # the tensors that were last checked, or written by the index
        self.handed_out = True  # whether other code may have written to them since
        self._sums: Tensor | None = None  # their checksums, if known

    def restore(self, earlier: Integrity) -> None:
        """Make this what it was when `earlier` was copied from it."""
        self._sources, self.handed_out, self._sums = earlier._sources, earlier.handed_out, earlier._sums

    def put(self, buffers: Mapping[str, Tensor]) -> None:
        """After the index has replaced the integer buffers."""
        self._know(buffers, handed_out=False)

    def moved(self, buffers: Mapping[str, Tensor]) -> None:
        """After all buffers were moved or cast by a function that may have changed their values."""
        self._know(buffers, handed_out=True)

    def _know(self, buffers: Mapping[str, Tensor], *, handed_out: bool) -> None:
        # Tensors without values have no checksums to compare the tensors that replace them with.
        known = not any(_has_no_values(buffers[name]) for name in schema.integers(buffers))
        self._sources = sources_of(buffers, schema.integers(buffers)) if known else {}
        self.handed_out, self._sums = handed_out, None

    def hand_out(self, buffers: dict[str, Tensor]) -> None:
        """Before other code reads the buffers: store their checksums while they are known to be correct."""
        if self.handed_out:
            return
        if self._sums is None and unchanged(self._sources, buffers):
            self._sums = checksums(buffers)
            buffers[CHECKSUMS] = self._sums.clone()
        self.handed_out = True

    def check(self, buffers: Mapping[str, Tensor], rows: RowFormat, *, flat: bool) -> bool:
        """Whether the integer buffers have other, valid values than the index last knew; RuntimeError if not valid.

        Buffers without values are not checked.
        """
        if not self.handed_out and unchanged(self._sources, buffers):
            return False
        now, changed = sources_of(buffers, schema.integers(buffers)), False
        if all(type(tensor) is Tensor and not tensor.is_meta for tensor, _ in now.values()):
            _refuse(schema.misfit_shapes(buffers, rows, flat))
            changed = self._compare(buffers, rows, flat)
        self._sources, self.handed_out = now, False
        return changed

    def _compare(self, buffers: Mapping[str, Tensor], rows: RowFormat, flat: bool) -> bool:
        """`check` for buffers of the right shapes."""
        found = checksums(buffers)
        as_known = self._sums is not None and torch.equal(found, self._sums)
        matches = _equal(found, buffers[CHECKSUMS])
        if as_known or matches:
            changed = not as_known and self._sums is not None
        else:
            names = ", ".join(schema.integers(buffers)[:-1]) + f" or {schema.integers(buffers)[-1]}"
            wrong: str | None = f"the values of {names} were changed in place"
            if any(buffers[name] is not tensor for name, (tensor, _) in self._sources.items()) or not self._sources:
                wrong = schema.misfit(buffers, rows, flat=flat)  # replaced by the caller: checked as a loaded state
            _refuse(wrong)
            changed = True
        self._sums = found if matches else None
        return changed


def _equal(found: Tensor, stored: Tensor) -> bool:
    """Whether stored checksums, which may have been moved, cast or left on the meta device, are those found."""
    alike = stored.dtype == found.dtype and not _has_no_values(stored)
    return alike and torch.equal(found, stored.to(found.device))


def _refuse(wrong: str | None) -> None:
    if wrong:
        raise RuntimeError(f"{wrong}. {_REMEDY}")
