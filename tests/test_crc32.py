"""CRC-32 by several threads is zlib's."""

from __future__ import annotations

import random
import zlib

import pytest
import torch

from torch_ivf_module import IndexFlatL2, _crc32, load
from torch_ivf_module._crc32 import crc32


@pytest.mark.parametrize("threads", [1, 2, 5])
@pytest.mark.parametrize("size", [0, 1, 63, 64, 65, 128, 1000, 4096])
def test_every_split_gives_the_number_of_zlib(size, threads, monkeypatch):
    monkeypatch.setattr(_crc32, "PIECE", 64)
    data = random.Random(size).randbytes(size)
    assert crc32(memoryview(data), threads) == zlib.crc32(data)
    assert crc32(memoryview(bytes(size)), threads) == zlib.crc32(bytes(size))


def test_pieces_in_another_order_have_another_number(monkeypatch):
    monkeypatch.setattr(_crc32, "PIECE", 64)
    data = random.Random(3).randbytes(256)
    assert crc32(memoryview(data[64:128] + data[:64] + data[128:]), 2) != crc32(memoryview(data), 2)


def test_a_file_written_by_one_thread_is_checked_by_several(tmp_path, monkeypatch):
    index = IndexFlatL2(8)
    index.add(torch.randn(50, 8, generator=torch.Generator().manual_seed(0)))
    index.save(tmp_path / "index.pt")
    monkeypatch.setattr(_crc32, "PIECE", 100)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    assert torch.equal(load(tmp_path / "index.pt").packed_embeddings, index.packed_embeddings)
    whole = bytearray((tmp_path / "index.pt").read_bytes())
    whole[whole.find(index.packed_embeddings.numpy().tobytes()) + 700] ^= 1
    (tmp_path / "index.pt").write_bytes(whole)
    with pytest.raises(ValueError, match="packed_embeddings does not match its checksum"):
        load(tmp_path / "index.pt")
