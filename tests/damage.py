"""Damage to the content of a file, drawn by a random generator: what disks, networks, other programs and attackers do.

`damaged` knows no format. `forged` alters tensors of an index and gives the file correct checksums again.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from torch_ivf_module import checkpoint

NUMBERS = (-1, 0, 1, 2**15, 2**31 - 1, 2**31, 2**32 - 1, 2**40, 2**62, 2**63 - 1)
FLOATS = (torch.nan, torch.inf, -torch.inf, 3e38, 0.0)


def _place(chance: random.Random, content: bytes, size: int = 1) -> int:
    """Where to damage so many bytes: half of the time at one of the ends, where the headers are."""
    end = max(0, len(content) - size)
    near = min(end, chance.choice((64, 512, 2048)))
    return chance.choice((chance.randint(0, near), end - chance.randint(0, near), *[chance.randint(0, end)] * 2))


def _over(content: bytes, at: int, new: bytes) -> bytes:
    return content[:at] + new[: len(content) - at] + content[at + len(new) :]


def bits(chance: random.Random, content: bytes) -> bytes:
    """One to eight bits are flipped."""
    changed = bytearray(content)
    for _ in range(chance.choice((1, 1, 1, 2, 8))):
        changed[_place(chance, content)] ^= 1 << chance.randrange(8)
    return bytes(changed)


def cut(chance: random.Random, content: bytes) -> bytes:
    """The end is missing."""
    return content[: _place(chance, content)]


def overwritten(chance: random.Random, content: bytes) -> bytes:
    """A range holds something else, or nothing, as after a crash of the system."""
    size = chance.choice((1, 4, 30, 512, 4096))
    new = chance.choice((bytes(size), b"\xff" * size, chance.randbytes(size)))
    return _over(content, _place(chance, content, size), new)


def huge(chance: random.Random, content: bytes) -> bytes:
    """An integer of the header has another value, such as a size of exabytes."""
    value, size = chance.choice(NUMBERS), chance.choice((4, 8))
    new = (value % 2 ** (8 * size)).to_bytes(size, chance.choice(("little", "little", "big")))
    return _over(content, _place(chance, content, size), new)


def digits(chance: random.Random, content: bytes) -> bytes:
    """A number that is written in digits has another value, as in headers of text."""
    places = [at for at, byte in enumerate(content) if 48 <= byte <= 57]
    if not places:
        return bits(chance, content)
    at = chance.choice(places)
    return _over(content, at, chance.choice((b"9", b"0", b"-", b"99999999999999999999", b"1e9")))


def swapped(chance: random.Random, content: bytes) -> bytes:
    """Two ranges have changed places, or one is there twice."""
    size = chance.choice((8, 64, 1024))
    one, other = _place(chance, content, size), _place(chance, content, size)
    first, second = content[one : one + size], content[other : other + size]
    changed = _over(content, other, first)
    return changed if chance.random() < 0.5 else _over(changed, one, second)


def shifted(chance: random.Random, content: bytes) -> bytes:
    """Bytes are missing, or too many, so that all others are at another place."""
    at, size = _place(chance, content), chance.choice((1, 7, 64, 1000))
    if chance.random() < 0.5:
        return content[:at] + content[at + size :]
    return content[:at] + chance.randbytes(size) + content[at:]


def spliced(chance: random.Random, content: bytes) -> bytes:
    """Followed by itself or by anything, or nothing but that."""
    return chance.choice((content + content, content + chance.randbytes(99), chance.randbytes(500), b""))


DAMAGES: tuple[Callable[[random.Random, bytes], bytes], ...] = (
    bits, cut, overwritten, huge, digits, swapped, shifted, spliced
)  # fmt: skip


def damaged(chance: random.Random, content: bytes) -> tuple[str, bytes]:
    """The name of some damage, and the content with it; a fifth of the time with two."""
    chosen = chance.choices(DAMAGES, k=1 + (chance.random() < 0.2))
    for damage in chosen:
        content = damage(chance, content) if content else content
    return " and ".join(damage.__name__ for damage in chosen), content


# --- with correct checksums ---------------------------------------------------------------------------------


def forged(chance: random.Random, source: Path, target: Path) -> str:
    """Write the index of `source` to `target` with altered tensors or settings, and correct checksums; says what is."""
    about, tensors = contents(source)
    names, altered = sorted(tensors), []
    for _ in range(chance.choice((1, 1, 2))):
        name = chance.choice(names)
        what = chance.choice((_exchange, _entry, _entry, _shape, _dtype, _setting))
        altered.append(f"{what.__name__[1:]} {name}")
        if what is _exchange:
            other = chance.choice(names)
            tensors[name], tensors[other] = tensors[other], tensors[name]
        elif what is _setting:
            _setting(chance, about)
        else:
            tensors[name] = what(chance, tensors[name]).contiguous()
    about["digests"] = {name: checkpoint._digest(tensor) for name, tensor in tensors.items()}
    about["digest"] = checkpoint._digest_of(about)
    if target.suffix == ".safetensors":
        from safetensors.torch import save_file

        tensors = {name: tensor.clone() for name, tensor in tensors.items()}  # which may not share memory there
        save_file(tensors, target, metadata=checkpoint.words(about))
    else:
        torch.save({**about, "state": tensors}, target)
    return " and ".join(altered)


def contents(path: Path) -> tuple[dict, dict[str, Tensor]]:
    """What a sound file says, and its tensors."""
    if path.suffix == ".safetensors":
        from safetensors import safe_open

        with safe_open(path, "pt") as file:
            about = {key: json.loads(value) for key, value in file.metadata().items()}
            return about, {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
    about = torch.load(path, weights_only=True)
    return about, about.pop("state")


def _exchange() -> None:
    """Two tensors have each other's name."""


def _entry(chance: random.Random, tensor: Tensor) -> Tensor:
    """One entry has another value."""
    tensor = tensor.clone()
    if tensor.numel():
        value = torch.tensor(chance.choice(FLOATS if tensor.is_floating_point() else NUMBERS))
        tensor.view(-1)[chance.randrange(tensor.numel())] = value.to(tensor.dtype)
    return tensor


def _shape(chance: random.Random, tensor: Tensor) -> Tensor:
    """Shorter, longer, or of other dimensions."""
    rows = tensor[None] if not tensor.dim() else tensor
    flat = rows.flatten()
    return chance.choice((rows[:-1], rows[:0], torch.cat([rows, rows[-1:]]), flat, rows[None], flat[:1].sum(), rows.T))


def _dtype(chance: random.Random, tensor: Tensor) -> Tensor:
    kinds = (torch.float32, torch.float64, torch.float16, torch.int64, torch.int32, torch.uint8, torch.bool)
    return tensor.to(chance.choice(kinds))


def _setting(chance: random.Random, about: dict) -> None:
    """A setting has another value or is missing, or there is one more."""
    settings = chance.choice([part for part in (about, about.get("config")) if part and isinstance(part, dict)])
    name = chance.choice(sorted(settings))
    values = (*NUMBERS, None, "", "cosine", "IndexFlatL2", [1], {}, 1.5, True)
    if chance.random() < 0.8:
        settings[name] = chance.choice(values)
    elif chance.random() < 0.5:
        del settings[name]
    else:
        settings[name + "s"] = chance.choice(values)
