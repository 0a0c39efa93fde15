"""Scalar quantizers of faiss as indexes of codes, and the other way."""

from __future__ import annotations

import pytest
import torch

from tests.datasets import normal
from tests.problems import each_bits, few_training_rows
from torch_ivf_module import (
    IndexFlat,
    IndexIVFFlat,
    IndexIVFScalarQuantizer,
    IndexPreTransform,
    IndexScalarQuantizer,
    from_faiss,
    load,
    to_faiss,
)
from torch_ivf_module.functional import row_codes

ROWS, D, NLIST = 1500, 13, 8
KEPT = ["QT_8bit_uniform", "QT_4bit_uniform", "QT_8bit_direct", "QT_8bit_direct_signed"]
ENCODED = ["QT_8bit", "QT_4bit", "QT_6bit"]
X = normal(ROWS, D)


def theirs(faiss, name, ivf=False, by_residual=False, metric="l2"):
    """A filled index of faiss with this quantizer, and the vectors that it decodes, by id."""
    kind = getattr(faiss.ScalarQuantizer, name)
    measure = faiss.METRIC_L2 if metric == "l2" else faiss.METRIC_INNER_PRODUCT
    x = (X * 20).clamp(-127, 127) if "signed" in name else (X * 20 + 100).clamp(0, 255) if "direct" in name else X
    if ivf:
        coarse = faiss.IndexFlat(D, measure)
        index = faiss.IndexIVFScalarQuantizer(coarse, D, NLIST, kind, measure, by_residual)
    else:
        index = faiss.IndexScalarQuantizer(D, kind, measure)
    index.train(x.numpy())
    index.add(x.numpy())
    if ivf:
        index.make_direct_map()
    return index, torch.from_numpy(index.reconstruct_n(0, ROWS))


def bits_of(name):
    return 4 if "4bit" in name else 8


@pytest.mark.parametrize("ivf", [False, True])
@pytest.mark.parametrize("name", KEPT)
def test_codes_with_one_range_are_kept(faiss, name, ivf):
    index, decoded = theirs(faiss, name, ivf)
    ours = from_faiss(index)
    assert type(ours) is (IndexIVFScalarQuantizer if ivf else IndexScalarQuantizer)
    assert ours.config()["bits"] == bits_of(name)
    torch.testing.assert_close(ours.reconstruct_n(0, ROWS), decoded, rtol=1e-6, atol=2e-6)
    if not ivf:
        codes = torch.from_numpy(faiss.vector_to_array(index.codes).reshape(ROWS, -1))
        assert torch.equal(ours.packed_codes[:, :-8], codes)


@pytest.mark.parametrize(("ivf", "by_residual"), [(False, False), (True, False), (True, True)])
@pytest.mark.parametrize("name", [*ENCODED, *KEPT[:2]])
@pytest.mark.parametrize("metric", ["l2", "ip"])
def test_other_codes_are_encoded_again_within_the_documented_error(faiss, metric, name, ivf, by_residual):
    index, decoded = theirs(faiss, name, ivf, by_residual, metric)
    ours = from_faiss(index)
    bits = bits_of(name)
    assert ours.config()["bits"] == bits
    assert ours.metric == metric
    found = ours.reconstruct_n(0, ROWS)
    extent = decoded.amax(1) - decoded.amin(1)
    assert ((found - decoded).abs() <= 0.501 * extent[:, None] / (2**bits - 1) + 1e-5).all()
    if ivf:  # no vector has changed its list
        tools = pytest.importorskip("faiss.contrib.inspect_tools")
        for number, (start, end) in enumerate(zip(ours.list_offsets[:-1], ours.list_offsets[1:], strict=True)):
            assert ours.list_ids[start:end].tolist() == tools.get_invlist(index.invlists, number)[0].tolist()
    exact = from_faiss(index, codes=False)
    assert type(exact) in (IndexIVFFlat, type(exact))
    assert exact.dtype == torch.float32
    torch.testing.assert_close(exact.reconstruct_n(0, ROWS), decoded, rtol=0, atol=1e-6)


@pytest.mark.parametrize("recipe", ["SQ8", "IVF8,SQ4"])
def test_ids_transforms_and_files(faiss, recipe, tmp_path):
    index = faiss.index_factory(D, f"IDMap,PCA8,{recipe}")
    ids = torch.arange(ROWS) * 3 - 50
    index.train(X.numpy())
    index.add_with_ids(X.numpy(), ids.numpy())
    faiss.write_index(index, str(tmp_path / "theirs.faiss"))
    ours = load(tmp_path / "theirs.faiss")
    assert isinstance(ours, IndexPreTransform)
    assert type(ours.index) is (IndexScalarQuantizer if recipe == "SQ8" else IndexIVFScalarQuantizer)
    assert sorted(ours.index.list_ids.tolist()) == ids.tolist()
    assert int(ours.index.next_id) == int(ids.max()) + 1
    cosine = faiss.index_factory(D, f"L2norm,{recipe}", faiss.METRIC_INNER_PRODUCT)
    cosine.train(X.numpy())
    cosine.add(X.numpy())
    ours = from_faiss(cosine)
    assert (ours.metric, type(ours).__name__) == ("cosine", type(load(tmp_path / "theirs.faiss").index).__name__)
    ours.nprobe = 8
    assert (ours.search(X[:50], 1)[1][:, 0] == torch.arange(50)).double().mean() > 0.9


def test_float16_stays_float16(faiss):
    index, decoded = theirs(faiss, "QT_fp16")
    ours = from_faiss(index)
    assert isinstance(ours, IndexFlat)
    assert ours.dtype == torch.float16
    assert torch.equal(ours.reconstruct_n(0, ROWS).float(), decoded)
    index, decoded = theirs(faiss, "QT_fp16", ivf=True)
    assert type(from_faiss(index)) is IndexIVFFlat
    assert torch.equal(from_faiss(index).reconstruct_n(0, ROWS).float(), decoded)


@each_bits
@pytest.mark.parametrize("metric", ["l2", "ip", "cosine"])
@pytest.mark.parametrize("ivf", [False, True])
def test_to_faiss(faiss, ivf, metric, bits):
    if ivf:
        index = IndexIVFScalarQuantizer(D, nlist=NLIST, nprobe=3, metric=metric, bits=bits, max_codes=900)
        with few_training_rows():
            index.train(X)
    else:
        index = IndexScalarQuantizer(D, bits, metric)
    ids = torch.arange(ROWS) * 2 + 5
    index.add_with_ids(X, ids)
    outer = other = to_faiss(index)  # which owns the others
    if metric == "cosine":
        other = faiss.downcast_index(outer.index)
    inner = other if ivf else faiss.downcast_index(other.index)
    assert type(inner) is (faiss.IndexIVFScalarQuantizer if ivf else faiss.IndexScalarQuantizer)
    assert inner.sq.qtype == getattr(faiss.ScalarQuantizer, f"QT_{bits}bit")
    assert (other.ntotal, other.is_trained, inner.is_trained) == (ROWS, True, True)
    if ivf:
        assert (inner.nprobe, inner.max_codes, inner.by_residual) == (3, 900, False)
        inner.set_direct_map_type(faiss.DirectMap.Hashtable)
        found = torch.from_numpy(inner.reconstruct_batch(ids.numpy()))
    else:
        found = torch.stack([torch.from_numpy(other.reconstruct(int(number))) for number in ids])
    vectors = index.reconstruct_batch(ids)
    extent = vectors.amax(0) - vectors.amin(0)
    assert ((found - vectors).abs() <= 0.501 * extent / (2**bits - 1) + 1e-5).all()
    found = outer.search(X[:40].numpy(), 5)[1]
    assert set(found.flatten().tolist()) <= set(ids.tolist())


@each_bits
def test_to_faiss_without_vectors(faiss, bits):
    assert to_faiss(IndexScalarQuantizer(D, bits)).ntotal == 0
    index = IndexIVFScalarQuantizer(D, nlist=NLIST, bits=bits)
    assert not to_faiss(index).is_trained
    with few_training_rows():
        index.train(X)
    assert to_faiss(index).ntotal == 0
    assert from_faiss(to_faiss(index)).ntotal == 0


def test_rows_as_faiss_has_them_are_rows_as_this_library_has_them():
    """The order of two codes in a byte is the same."""
    rows = row_codes.assembled(torch.tensor([[0x21, 0x03]], dtype=torch.uint8), torch.tensor([[1.0, 0.0]]))
    assert row_codes.as_float(rows, 3).tolist() == [[1.0, 2.0, 3.0]]
