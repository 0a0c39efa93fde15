"""The files of `checkpoint.save`, written in one pass from pieces of their tensors, which never are in memory at once.

A file of torch is a zip archive, which has an entry for each tensor and one, `data.pkl`, for what holds them. Here that
one comes last, since it holds the checksums.
"""

from __future__ import annotations

import json
import struct
import zipfile
import zlib
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.serialization import skip_data

from ..checkpoint import words, written
from .spool import Drained, as_bytes

__all__ = ["Entry", "of_tensor", "write"]

_ALIGNED = 64  # bytes, as torch.save aligns tensors
_SAFETENSORS = {
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.uint8: "U8",
    torch.int64: "I64",
}  # fmt: skip

Header = Callable[[Mapping[str, int]], dict[str, Any]]  # of the CRC-32 of each tensor


class Entry(NamedTuple):
    """A tensor to write."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    pieces: Iterable[Tensor]  # its rows, consecutive pieces of them

    @property
    def numel(self) -> int:
        """Numbers in it."""
        return torch.Size(self.shape).numel()


def of_tensor(tensor: Tensor) -> Entry:
    """A tensor that is in memory."""
    held = tensor.detach().cpu().contiguous()
    return Entry(held.dtype, tuple(held.shape), [held])


def write(part: Path, entries: Mapping[str, Entry], header: Header) -> None:
    """Write the tensors to the file `part`: by safetensors where the suffix is .safetensors, else as torch.save."""
    (_write_safetensors if part.suffix.lower() == ".safetensors" else _write_torch)(part, entries, header)


def _write_torch(part: Path, entries: Mapping[str, Entry], header: Header) -> None:
    crcs = {}
    with Drained(part, "w") as file, zipfile.ZipFile(file, "w") as archive:
        for number, (name, entry) in enumerate(entries.items()):
            info = _aligned(f"{part.stem}/data/{number}", archive.start_dir)
            with archive.open(info, "w", force_zip64=True) as opened:
                for piece in entry.pieces:
                    opened.write(as_bytes(piece))
            crcs[name] = info.CRC
        with zipfile.ZipFile(_without_values(part, entries, header(crcs))) as frame:
            for info in frame.infolist():
                _, _, rest = info.filename.partition("/")
                if not rest.startswith("data/"):
                    archive.writestr(_aligned(f"{part.stem}/{rest}", archive.start_dir), frame.read(info))


def _aligned(name: str, at: int) -> zipfile.ZipInfo:
    """An entry whose header begins at byte `at`, with padding as torch.save writes it, in a field that readers skip."""
    info = zipfile.ZipInfo(name)
    info.CRC = 0  # ZipFile.open sets it, too
    info.extra = struct.pack("<HH", 0x4246, 0)
    padding = -(at + len(info.FileHeader(zip64=True))) % _ALIGNED
    info.extra = struct.pack("<HH", 0x4246, padding) + b"Z" * padding
    return info


def _without_values(part: Path, entries: Mapping[str, Entry], about: dict[str, Any]) -> Path:
    """What torch.save writes of tensors of these shapes, but for their values: holes in a file."""
    path, holes = part.with_name("frame.pt"), str(part.with_name("holes"))
    state = {
        name: (torch.from_file(holes, shared=True, size=entry.numel, dtype=entry.dtype) if entry.numel
               else torch.empty(0, dtype=entry.dtype, device="cpu")).reshape(entry.shape)
        for name, entry in entries.items()
    }  # fmt: skip
    with skip_data():
        written(part, lambda: torch.save({**about, "state": state}, path))
    return path


def _write_safetensors(part: Path, entries: Mapping[str, Entry], header: Header) -> None:
    """The length of the header and the header, as JSON, then the tensors: those of the widest numbers first, so that
    all are aligned."""
    order = sorted(entries, key=lambda name: (-entries[name].dtype.itemsize, name))
    about: dict[str, Any] = {}
    at = 0
    for name in order:
        size = entries[name].numel * entries[name].dtype.itemsize
        about[name] = {
            "dtype": _SAFETENSORS[entries[name].dtype], "shape": entries[name].shape, "data_offsets": [at, at + size],
        }  # fmt: skip
        at += size

    def text(crcs: dict[str, int]) -> bytes:
        return json.dumps({"__metadata__": words(header(crcs)), **about}).encode()

    most = 2**32 - 1  # no CRC-32 has more digits, nor the one of the header
    room = -(-(len(text(dict.fromkeys(order, most))) + len(str(most))) // 8) * 8
    crcs = dict.fromkeys(order, 0)
    with Drained(part, "w") as file:
        file.seek(8 + room)
        for name in order:
            for piece in entries[name].pieces:
                crcs[name] = zlib.crc32(as_bytes(piece), crcs[name])
                file.write(as_bytes(piece))
        file.seek(0)
        file.write(struct.pack("<Q", room) + text({name: crcs[name] for name in entries}).ljust(room))
