"""One index in one file: written whole or not at all, opened without executing anything."""

from __future__ import annotations

import json
import os
import pickle
import zipfile
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from . import faiss_bridge, torch_ivf_bridge
from ._files import readable, replace
from ._optional import require
from .index import (
    IndexFlat,
    IndexFlatIP,
    IndexFlatL2,
    IndexIVFFlat,
    IndexIVFScalarQuantizer,
    IndexPreTransform,
    IndexScalarQuantizer,
    row_format,
)
from .index.base import IndexBase
from .index.coding import Setting, checked_codes
from .index.pre_transform import Normalize

FORMAT = "torch_ivf_module"
VERSION = 1
NEEDS = "0.1.0"  # the first release that reads VERSION; written into the file, for the errors of older ones
PLAIN: dict[str, type[IndexBase]] = {
    kind.__name__: kind
    for kind in (IndexFlat, IndexFlatL2, IndexFlatIP, IndexIVFFlat, IndexScalarQuantizer, IndexIVFScalarQuantizer)
}
_NOT_OURS = "the file is empty, truncated, or was not written by index.save"
_TRIES = 20  # of reading a file that is being replaced meanwhile
CLASSES = (*PLAIN, IndexPreTransform.__name__)

AnyIndex = IndexBase | IndexPreTransform


class BadFile(ValueError):
    """The file is not an index, or is damaged; the text says why."""


def save(index: AnyIndex, path: str | os.PathLike[str], notes: Mapping[str, Any] | None = None) -> None:
    """Write `index` to `path`: by safetensors where the suffix is .safetensors, else as torch.save, which takes any.

    `notes` are values of JSON that `notes_in` reads again; `load` leaves them alone. See `IndexBase.save`.
    """
    path = Path(path)
    _plain(index).check_buffers()
    tensors = {name: _own(tensor) for name, tensor in index.state_dict().items()}
    about = header(index, {name: _digest(tensor) for name, tensor in tensors.items()}, notes)
    if path.suffix.lower() == ".safetensors":
        library = require("safetensors.torch", "safetensors")
        replace(path, lambda part: written(path, lambda: library.save_file(tensors, part, metadata=words(about))))
    else:
        replace(path, lambda part: written(path, lambda: torch.save({**about, "state": tensors}, part)))


def header(index: AnyIndex, digests: Mapping[str, int], notes: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """What a file says beside the tensors of `index`, whose CRC-32 are `digests`."""
    about: dict[str, Any] = {"format": FORMAT, "version": VERSION, "needs": NEEDS, **description(index)}
    if notes is not None:
        about["notes"] = notes
    about["digests"] = dict(digests)
    about["digest"] = _digest_of(about)
    return about


def words(about: Mapping[str, Any]) -> dict[str, str]:
    """The header as the metadata of a safetensors file, which are texts."""
    return {key: json.dumps(value) for key, value in about.items()}


def written(path: Path, write: Callable[[], None]) -> None:
    """`write`, whose library raises what it likes when the disk is full."""
    try:
        write()
    except (OSError, MemoryError):
        raise
    except Exception as error:
        raise OSError(f"{path} cannot be written: {error}") from error


def _own(tensor: Tensor) -> Tensor:
    """A tensor as it is to be written: on the CPU, and no view of a larger one, which would be written too."""
    tensor = tensor.detach().cpu().contiguous()
    part = tensor.untyped_storage().nbytes() > tensor.nbytes
    return tensor.clone(memory_format=torch.contiguous_format) if part else tensor


def load(
    path: str | os.PathLike[str],
    *,
    device: torch.device | str | None = None,
    mmap: bool = False,
    codes: Setting = "saved",
) -> AnyIndex:
    """Open the index in a file; the file determines its class.

    Supported are files of `save`, of torch-ivf 0.1.1, and of `faiss.write_index` (extra `faiss`).

    Parameters
    ----------
    path : the file.
    device : where to put the index; the CPU by default.
    mmap : map the vectors instead of reading them. Their checksum is then not checked. No effect for files of faiss.
    codes : replaces the saved setting `codes`. With ``mmap=True, codes=8`` the 8-bit codes are in memory, and a search
        reads from the file only the rows that the codes do not exclude.

    Nothing in the file is executed. Files of faiss are parsed by faiss, so open only those you trust. Raises
    `BadFile` (a ValueError) for a file that is damaged, not an index, or from a newer release; FileNotFoundError if
    there is no such file; ImportError, which names the extra, if a package is missing; MemoryError,
    which names the file.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     IndexFlatL2(4).save(f"{folder}/index.pt")
    ...     load(f"{folder}/index.pt").d
    4
    """
    path = Path(path)
    codes = codes if codes == "saved" else checked_codes(codes)
    if path.is_dir():
        raise IsADirectoryError(f"{path} is a folder, but load opens files; for a folder use from_pretrained")
    if not path.is_file():
        raise FileNotFoundError(f"no such file: {path}")
    index = _unreplaced(path, lambda: _open(path, mmap))
    if codes != "saved":
        _plain(index).codes = codes
    return index if device is None else index.to(device)


def notes_in(path: str | os.PathLike[str]) -> Mapping[str, Any]:
    """The notes that `save` wrote into a file of its own, empty if there are none; no tensor is read."""
    path = Path(path)
    if path.suffix.lower() == ".safetensors":
        return _reading(path, lambda: _read_safetensors(path, True)[0].get("notes", {}))
    return {} if faiss_bridge.is_file(path) else _reading(path, lambda: _read_torch(path, True).get("notes", {}))


def _unreplaced(path: Path, read: Callable[[], AnyIndex]) -> AnyIndex:
    """What `read` makes of a file that another process may be replacing: of one file, not of the old one's head and the
    new one's vectors, for the readers open a file by its name more than once."""
    for _ in range(_TRIES):
        before = _identity(path)
        try:
            index = read()
        except BadFile:
            if _identity(path) == before:
                raise
        else:
            if _identity(path) == before:
                return index
    raise BadFile(f"{path} was replaced {_TRIES} times while it was being read")


def _identity(path: Path) -> tuple[int, int, int]:
    about = path.stat()
    return about.st_ino, about.st_mtime_ns, about.st_size


def _open(path: Path, mmap: bool) -> AnyIndex:
    if path.suffix.lower() == ".safetensors":
        about, tensors = _reading(path, lambda: _read_safetensors(path, mmap))
    elif faiss_bridge.is_file(path):
        return _reading(path, lambda: faiss_bridge.read(path))
    else:
        about = _reading(path, lambda: _read_torch(path, mmap))
        if torch_ivf_bridge.is_state(about):
            return _reading(path, lambda: torch_ivf_bridge.from_state(about))
        tensors = about.get("state")
    return _reading(path, lambda: _checked(path, about, tensors, unread=row_format.NAMES if mmap else ()))


def _reading(path: Path, read: Callable[[], Any]) -> Any:
    """The result of `read`, whose errors become BadFile."""
    return readable(read, BadFile, f"{path} cannot be read as an index")


def _read_torch(path: Path, mmap: bool) -> Mapping[str, Any]:
    if mmap and not zipfile.is_zipfile(path):  # torch's own text would advise saving it by an option of torch.save
        raise ValueError(f"{_NOT_OURS}; `build` makes an index from a file of vectors")
    try:
        about = torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
    except (pickle.UnpicklingError, EOFError, LookupError) as error:  # with texts of the pickle module, or advice of
        raise ValueError(f"{_NOT_OURS}, or it contains code, which is never executed") from error  # torch to run code
    if not isinstance(about, dict):
        raise ValueError(f"it contains a {type(about).__name__}, not an index")
    return about


def _read_safetensors(path: Path, mmap: bool) -> tuple[Mapping[str, Any], dict[str, Tensor]]:
    library = require("safetensors", "safetensors")
    with library.safe_open(path, framework="pt") as file:
        said = file.metadata() or {}
        about = {key: json.loads(value) for key, value in said.items()} if "digest" in said else {}
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
    return about, tensors if mmap else {name: tensor.clone() for name, tensor in tensors.items()}


def _checked(path: Path, about: Mapping[str, Any], tensors: object, unread: tuple[str, ...]) -> AnyIndex:
    """The index that a file describes, if all of it is sound; the digests of buffers named in `unread` are left alone.
    """
    if about.get("format") != FORMAT or not isinstance(tensors, dict):
        raise BadFile(f"{path} was not written by torch_ivf_module")
    version = about.get("version")
    if type(version) is not int or not 1 <= version <= VERSION:
        raise BadFile(
            f"{path} has format version {version}, this release reads up to {VERSION}; "
            f"it needs torch_ivf_module {about.get('needs')} or newer"
        )
    digests = about.get("digests")
    if about.get("digest") != _digest_of(about) or not isinstance(digests, dict) or set(digests) != set(tensors):
        raise BadFile(f"{path} is damaged: its description does not match its checksum")
    for name, tensor in tensors.items():
        if not isinstance(tensor, Tensor) or tensor.device.type != "cpu" or not tensor.is_contiguous():
            raise BadFile(f"{path} is damaged: {name} is not a contiguous tensor")
        if name.rpartition(".")[2] not in unread and digests[name] != _digest(tensor):
            raise BadFile(f"{path} is damaged: {name} does not match its checksum")
    index = rebuilt(about)
    index.load_state_dict(tensors, assign=True)
    if not unread:
        store = _plain(index).store
        store.format.check_values(store.packed)
    return index


def _plain(index: AnyIndex) -> IndexBase:
    """The index that holds the vectors."""
    return index.index if isinstance(index, IndexPreTransform) else index


def description(index: AnyIndex) -> dict[str, Any]:
    """What rebuilds `index` but for its tensors, as JSON can hold it. TypeError if it is none of CLASSES."""
    name = type(index).__name__
    if isinstance(index, IndexPreTransform):
        config: dict[str, Any] = {"d": index.d, "steps": [], "index": description(index.index)}
        for step in index.steps():
            linear = isinstance(step, nn.Linear)
            config["steps"].append([step.in_features, step.out_features, step.bias is not None] if linear else "l2norm")
        return {"class": name, "config": config}
    if name not in PLAIN:
        raise TypeError(f"index must be one of {', '.join(CLASSES)}, got {name}")
    return {"class": name, "config": index.config()}


def rebuilt(about: Mapping[str, Any]) -> AnyIndex:
    """The index that a description tells of, on the meta device and without its tensors."""
    name, config = about["class"], dict(about["config"])
    if name == IndexPreTransform.__name__:
        inner = rebuilt(config["index"])
        if not isinstance(inner, IndexBase):
            raise TypeError(f"it has {name} within {name}")
        steps = [Normalize() if step == "l2norm" else _linear(*step) for step in config["steps"]]
        return IndexPreTransform(config["d"], nn.Sequential(*steps).requires_grad_(False), inner)
    if name not in PLAIN:
        raise ValueError(f"it contains a {name!r}, this release knows {', '.join(CLASSES)}")
    if "dtype" in config:
        config["dtype"] = getattr(torch, config["dtype"])
    if name in (IndexFlatL2.__name__, IndexFlatIP.__name__):
        del config["metric"]
    return PLAIN[name](**config, device="meta")


def _linear(d: int, out: int, bias: bool) -> nn.Linear:
    return nn.Linear(d, out, bias, dtype=torch.float32, device="meta")


def _digest(tensor: Tensor) -> int:
    """CRC-32 of a tensor's bytes."""
    return zlib.crc32(tensor.flatten().view(torch.uint8).numpy().data)


def _digest_of(about: Mapping[str, Any]) -> int:
    """CRC-32 of what a file says of itself."""
    said = {key: value for key, value in about.items() if key not in ("digest", "state")}
    return zlib.crc32(json.dumps(said, sort_keys=True).encode())
