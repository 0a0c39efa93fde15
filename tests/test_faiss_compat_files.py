"""faiss_compat: files and bytes of both formats, and the package under the name of faiss."""

from __future__ import annotations

import io
import pickle
import subprocess
import sys

import numpy as np
import pytest

import torch_ivf_module
import torch_ivf_module.faiss_compat as compat
from tests.test_faiss_compat import IDS, KINDS, XB, XQ, D, K, each_kind, flat, ivf, same

FORMATS = ["torch_ivf_module", "faiss"]


def filled(kind):
    index = KINDS[kind](compat)
    if kind.startswith("id_map"):
        index.add_with_ids(XB, IDS)
    else:
        index.add(XB)
    return index


@pytest.mark.parametrize("format", FORMATS)
@each_kind
def test_a_file_gives_the_same_index(faiss, kind, format, tmp_path):
    index, path = filled(kind), tmp_path / "an.index"
    compat.write_index(index, str(path), format=format)
    same(index.search(XQ, K), compat.read_index(str(path)).search(XQ, K))
    data = compat.serialize_index(index, format=format)
    assert data.dtype == np.uint8
    again = compat.deserialize_index(data)
    assert again.ntotal == index.ntotal
    if format == "faiss":
        if kind != "id_map_ivf":
            same(index.search(XQ, K), faiss.read_index(str(path)).search(XQ, K))
        return
    assert isinstance(again, type(index))
    np.testing.assert_array_equal(
        torch_ivf_module.load(path).search(XQ.astype("float32"), K)[1].numpy(), index.search(XQ, K)[1]
    )
    if "ivf" in kind:
        assert compat.extract_index_ivf(again).nprobe == 3
    if kind.startswith("id_map"):
        again.add_with_ids(XB[:2], np.array([90_001, 90_002]))
    else:
        again.add(XB[:2])
    assert again.ntotal == index.ntotal + 2


@each_kind
def test_files_of_faiss(faiss, kind, tmp_path):
    index, path = KINDS[kind](faiss), str(tmp_path / "theirs.index")
    if kind.startswith("id_map"):
        index.add_with_ids(XB, IDS)
    else:
        index.add(XB)
    faiss.write_index(index, path)
    same(index.search(XQ, K), compat.read_index(path).search(XQ, K))
    same(index.search(XQ, K), compat.deserialize_index(faiss.serialize_index(index)).search(XQ, K))


@pytest.mark.parametrize("kind", ["flat", "id_map"])
def test_an_empty_index_keeps_its_kind(kind):
    again = compat.deserialize_index(compat.serialize_index(KINDS[kind](compat)))
    assert type(again).__name__ == {"flat": "IndexFlatL2", "id_map": "IndexIDMap2"}[kind]
    if kind == "id_map":
        again.add_with_ids(XB[:3], IDS[:3])
        again.add_with_ids(XB[:3], np.arange(3))


def test_an_untrained_index():
    index = compat.IndexIVFFlat(compat.IndexFlatL2(D), D, 8)
    again = compat.deserialize_index(compat.serialize_index(index))
    assert (again.is_trained, again.nlist) == (False, 8)
    again.cp.min_points_per_centroid = 1
    again.train(XB)
    with pytest.raises(RuntimeError, match="not trained"):
        compat.serialize_index(compat.index_factory(D, "PCA4,Flat"))


def test_several_transforms(tmp_path):
    index = compat.index_factory(D, "IDMap2,PCA8,L2norm,IVF4,Flat")
    index.train(XB)
    index.add_with_ids(XB, IDS)
    again = compat.deserialize_index(compat.serialize_index(index))
    same(index.search(XQ, K), again.search(XQ, K))
    assert [type(part).__name__ for part in again.index.chain] == ["LinearTransform", "NormalizationTransform"]
    np.testing.assert_allclose(again.reconstruct(int(IDS[0])), index.reconstruct(int(IDS[0])), atol=1e-6)


@pytest.mark.parametrize("lists", [False, True])
def test_an_index_by_cosine(lists, tmp_path):
    if lists:
        plain = torch_ivf_module.IndexIVFFlat(D, nlist=4, nprobe=2, metric="cosine").train(XB)
    else:
        plain = torch_ivf_module.IndexFlat(D, "cosine")
    plain.add(XB)
    plain.save(tmp_path / "cosine.safetensors")
    index = compat.read_index(str(tmp_path / "cosine.safetensors"))
    found = [part.numpy() for part in plain.search(XQ, K)]
    same(found, index.search(XQ, K))
    assert compat.deserialize_index(compat.serialize_index(index)).chain.size() == 1


def test_readers_and_writers(tmp_path):
    index, file = filled("ivf"), io.BytesIO()
    compat.write_index(index, compat.BufferedIOWriter(compat.PyCallbackIOWriter(file.write)))
    writer = compat.VectorIOWriter()
    compat.write_index(index, writer)
    assert compat.vector_to_array(writer.data).tobytes() == file.getvalue()
    reader = compat.VectorIOReader()
    compat.copy_array_to_vector(writer.data, reader.data)
    same(index.search(XQ, K), compat.read_index(reader).search(XQ, K))
    file.seek(0)
    again = compat.read_index(compat.BufferedIOReader(compat.PyCallbackIOReader(file.read, 100)))
    same(index.search(XQ, K), again.search(XQ, K))
    same(index.search(XQ, K), pickle.loads(pickle.dumps(index)).search(XQ, K))


def test_a_mapped_file(tmp_path):
    path = str(tmp_path / "mapped.pt")
    compat.write_index(filled("flat"), path)
    same(filled("flat").search(XQ, K), compat.read_index(path, compat.IO_FLAG_MMAP).search(XQ, K))


def test_files_that_are_none(tmp_path):
    with pytest.raises(RuntimeError, match="nowhere"):
        compat.read_index(str(tmp_path / "nowhere"))
    (tmp_path / "text").write_text("hello")
    with pytest.raises(RuntimeError, match="cannot be read"):
        compat.read_index(str(tmp_path / "text"))
    with pytest.raises(RuntimeError, match="cannot be written"):
        compat.write_index(flat(compat), str(tmp_path / "no" / "folder" / "x"))
    with pytest.raises(ValueError, match="format must be"):
        compat.write_index(flat(compat), str(tmp_path / "x"), format="npz")


# -- in place of faiss: each in a process of its own -----------------------------------------------------------


def run(program):
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


def test_installed_under_the_name_of_faiss():
    program = """
import importlib.util, sys
from torch_ivf_module import faiss_compat
faiss_compat.install(); faiss_compat.install()
import numpy, torch, faiss
assert faiss is faiss_compat and faiss_compat.installed() and importlib.util.find_spec("faiss")
from faiss import IndexFlatL2
index = IndexFlatL2(2); index.add(numpy.eye(2))
assert type(index.reconstruct(0)) is numpy.ndarray
import faiss.contrib.torch_utils
assert torch.is_tensor(index.reconstruct(0)) and torch.is_tensor(index.search(torch.eye(2), 1)[0])
from faiss.contrib.inspect_tools import get_flat_data
try:
    import faiss.swigfaiss
except ImportError:
    print("none")
try:
    from faiss import IndexHNSWFlat
except ImportError:
    print("named")
faiss_compat.uninstall(); faiss_compat.uninstall()
assert not [name for name in sys.modules if name.split(".")[0] == "faiss"]
assert type(index.reconstruct(0)) is numpy.ndarray
faiss_compat.install()
assert faiss_compat.installed()
"""
    assert run(program) == ["none", "named"]


def test_the_real_faiss_is_not_replaced(faiss):
    assert sys.modules["faiss"] is faiss
    with pytest.raises(RuntimeError, match="faiss is imported already"):
        compat.install()
    compat.uninstall()
    assert sys.modules["faiss"] is faiss
    assert not compat.installed()


def test_files_of_faiss_while_it_is_replaced(faiss, tmp_path):
    faiss.write_index(faiss.IndexFlatL2(2), str(tmp_path / "theirs"))
    program = f"""
from torch_ivf_module import faiss_compat
faiss_compat.install()
for call in (lambda: faiss_compat.read_index({str(tmp_path / "theirs")!r}),
             lambda: faiss_compat.serialize_index(faiss_compat.IndexFlatL2(2), format="faiss")):
    try:
        call()
    except RuntimeError as error:
        print("uninstall" in str(error))
faiss_compat.uninstall()
print(faiss_compat.read_index({str(tmp_path / "theirs")!r}).d)
"""
    assert run(program) == ["True", "True", "2"]


def test_it_is_an_attribute_of_the_package_and_imports_no_faiss():
    program = """
import sys, torch_ivf_module
assert "torch_ivf_module.faiss_compat" not in sys.modules
torch_ivf_module.faiss_compat.IndexFlatL2(2)
print(sorted(name for name in sys.modules if name.split(".")[0] == "faiss"))
"""
    assert run(program) == ["[]"]


def test_an_inverted_file_with_another_quantizer_keeps_it():
    index = ivf(compat, "METRIC_INNER_PRODUCT", "METRIC_L2")
    index.add(XB)
    again = compat.deserialize_index(compat.serialize_index(index))
    same(index.search(XQ, K), again.search(XQ, K))
    with pytest.raises(compat.Unsupported, match="quantizer"):
        compat.serialize_index(index, format="faiss")
