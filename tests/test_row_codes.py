"""Coded rows: the layout of their bytes, and the error of every kind of row.

N rows, d dim.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tests.datasets import normal
from tests.oracle import decoded
from tests.problems import each_bits
from torch_ivf_module.functional import row_codes

DIMENSIONS = (1, 2, 3, 8, 67, 128, 4096)
TINY = 2.0**-149


def rows_of(d: int) -> dict[str, torch.Tensor]:
    """Rows that a codec may get wrong."""
    x = normal(20, d)
    outlier = x.clone()
    outlier[:, 0] = 1e30
    return {
        "plain": x,
        "constant": torch.full((3, d), 0.1),
        "zero": torch.zeros(3, d),
        "denormal": x * 1e-40,
        "few denormal steps": (x * 40).round() * TINY,
        "one denormal step": (x > 0) * TINY,
        "huge": x * 1e37,
        "far from zero": x + 1e4,
        "steps": x.sign(),
        "one enormous entry": outlier,
        "one small entry": torch.cat([torch.ones(3, 1), torch.full((3, d - 1), 1e-6)], 1),
        "negative zero": -torch.zeros(3, d),
        "no rows": x[:0],
    }


@each_bits
@pytest.mark.parametrize("d", DIMENSIONS)
@pytest.mark.parametrize("name", rows_of(2))
def test_the_error_is_within_the_bound(name, d, bits):
    x = rows_of(d)[name]
    rows = row_codes.encode(x, bits)
    assert rows.dtype == torch.uint8
    assert rows.shape == (len(x), row_codes.width(d, bits))
    found = row_codes.as_float(rows, d)
    assert found.dtype == torch.float32
    assert found.isfinite().all()
    error = (found.double() - x.double()).abs()
    bound = row_codes.error_bound(rows, d)
    assert (error <= bound[:, None]).all()
    # The bound is half a step, and what rounding may add.
    extent = x.double().amax(1) - x.double().amin(1) if len(x) else x.new_zeros(0)
    largest = x.double().abs().amax(1) if len(x) else x.new_zeros(0)
    assert (bound <= 0.501 * extent / (2**bits - 1) + 2.0**-22 * largest + 2 * TINY).all()
    if name in ("constant", "zero", "negative zero", "steps"):
        assert torch.equal(found, x + 0.0) if name != "steps" or bits == 8 else (found - x).abs().max() < 1e-6


@each_bits
@pytest.mark.parametrize("d", DIMENSIONS)
def test_the_layout_of_the_bytes(d, bits):
    x = normal(9, d, seed=d)
    rows = row_codes.encode(x, bits)
    assert torch.equal(row_codes.as_float(rows, d).double(), decoded(rows, d))  # which is written in numpy
    content = rows.numpy()
    scale, offset = np.frombuffer(content[:, -8:].tobytes(), "<f4").reshape(-1, 2).T
    np.testing.assert_array_equal(offset, x.amin(1).numpy())
    levels = 2**bits - 1
    np.testing.assert_allclose(scale, ((x.amax(1) - x.amin(1)) / levels).numpy(), rtol=1e-6)
    wanted = torch.zeros(9, d + d % 2, dtype=torch.long)
    step = (x.double() - x.amin(1, keepdim=True)) / torch.from_numpy(scale.copy())[:, None].double().clamp(min=TINY)
    wanted[:, :d] = step.round().long()
    if bits == 4:
        assert (content[:, :-8] == (wanted[:, ::2] + 16 * wanted[:, 1::2]).numpy()).all()
    else:
        assert (content[:, :-8] == wanted[:, :d].numpy()).all()


def test_bits_follow_from_the_width():
    for d in DIMENSIONS:
        for bits in row_codes.BITS:
            assert row_codes.bits_of(row_codes.width(d, bits), d) == (8 if d == 1 else bits)
        assert row_codes.bits_of(d + 9, d) is None
    assert [row_codes.width(128, bits) for bits in row_codes.BITS] == [136, 72]


@each_bits
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_vectors_of_every_dtype_are_encoded_as_float32(dtype, bits):
    x = normal(30, 7).to(dtype)
    assert torch.equal(row_codes.encode(x, bits), row_codes.encode(x.float(), bits))


@each_bits
def test_parts_and_positions_decode_alike(bits):
    x = normal(50, 11)
    rows = row_codes.encode(x, bits)
    whole = row_codes.as_float(rows, 11)
    split = row_codes.SplitRows(*row_codes.split(rows))
    at = torch.tensor([3, 3, 49, 0])
    for kind in (rows, split):
        assert torch.equal(row_codes.as_float(kind, 11), whole)
        assert torch.equal(row_codes.as_float(row_codes.rows_at(kind, at), 11), whole[at])
        assert kind.shape[0] == 50
    assert torch.equal(row_codes.as_float(rows[7], 11), whole[7])
    assert torch.equal(row_codes.as_float(rows[at.view(2, 2)], 11), whole[at].view(2, 2, 11))
    assert torch.equal(row_codes.assembled(*split), rows)
    floats = x.half()
    assert row_codes.vectors_of(floats, 11) is floats
    assert row_codes.as_float(x, 11) is x


@each_bits
def test_rows_in_chunks_are_those_of_one_call(bits, monkeypatch):
    x = normal(40, 5)
    whole = row_codes.encode(x, bits)
    monkeypatch.setattr(row_codes, "_ENTRIES", 15)
    assert torch.equal(row_codes.encode(x, bits), whole)
