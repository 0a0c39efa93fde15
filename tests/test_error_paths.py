"""What no other test reaches, most of it errors that few callers meet: files of other things, states that do not fit,
and what faiss's interface refuses."""

from __future__ import annotations

import itertools

import numpy
import pytest
import torch
from torch import nn

from tests.datasets import normal
from tests.test_errors import refuses
from torch_ivf_module import (
    IndexFlatL2,
    IndexIVFFlat,
    IndexPreTransform,
    SearchParams,
    cli,
    from_faiss,
    load,
    native,
)
from torch_ivf_module.checkpoint import BadFile
from torch_ivf_module.faiss_compat import IndexFlat, Kmeans, index_cpu_to_gpus_list, index_factory
from torch_ivf_module.faiss_compat.arrays import Unsupported
from torch_ivf_module.faiss_compat.transforms import VectorTransform
from torch_ivf_module.faiss_compat.vectors import Vector, copy_array_to_vector, rev_swig_ptr, vector_to_array
from torch_ivf_module.vector_files import BadData, open_vectors

D = 4


def filled(index: nn.Module) -> nn.Module:
    index.train(normal(40, D)).add(normal(40, D))
    return index


# --- files --------------------------------------------------------------------------------------------------


def test_files_of_torch_that_hold_something_else_are_refused(tmp_path):
    torch.save([1, 2], tmp_path / "list.pt")
    with refuses(BadFile, "list.pt", "contains a list, not an index"):
        load(tmp_path / "list.pt")
    with refuses(BadData, "list.pt", "a tensor or a dict of tensors", "got list"):
        open_vectors(tmp_path / "list.pt")


def test_only_known_classes_are_saved(tmp_path):
    class Own(IndexFlatL2):
        pass

    with refuses(TypeError, "IndexFlatL2", "got Own"):
        Own(D).save(tmp_path / "own.pt")
    assert not list(tmp_path.iterdir())


def test_a_file_that_is_replaced_all_the_time_is_not_read(tmp_path, monkeypatch):
    filled(IndexFlatL2(D)).save(tmp_path / "index.pt")
    versions = itertools.count()
    monkeypatch.setattr("torch_ivf_module.checkpoint._identity", lambda path: (next(versions), 0, 0))
    with refuses(BadFile, "index.pt", "was replaced 20 times while it was being read"):
        load(tmp_path / "index.pt")


# --- arrays and states --------------------------------------------------------------------------------------


def test_arrays_that_are_not_dense_say_what_to_pass():
    class Sparse:
        def toarray(self):
            raise AssertionError("must not be called")

    index = filled(IndexFlatL2(D))
    with refuses(TypeError, "x must be dense", "Sparse", "x.toarray()"):
        index.search(Sparse(), 1)
    with refuses(ValueError, "x must have rows of one length"):
        index.search([[1.0, 2.0, 3.0, 4.0], [1.0]], 1)


@pytest.mark.parametrize(
    ("index", "name", "value", "said"),
    [
        (IndexFlatL2(D), "centroids", torch.zeros(1, D), "a flat index has no centroids, got 1"),
        (IndexIVFFlat(D, nlist=2), "packed_embeddings", torch.zeros(1, D), "list_ids has 0 entries for 1 rows"),
        (IndexFlatL2(D), "next_id", torch.zeros(()), "next_id must be an int64 scalar, got torch.float32 ()"),
    ],
    ids=["centroids", "rows", "next_id"],
)
def test_states_that_do_not_fit_leave_the_index_as_it_was(index, name, value, said):
    with refuses(RuntimeError, said):
        index.load_state_dict({**index.state_dict(), name: value})
    assert index.ntotal == 0


def test_rows_without_centroids_are_refused():
    index = IndexIVFFlat(D, nlist=2)
    row = {"packed_embeddings": torch.zeros(1, D), "list_ids": torch.zeros(1, dtype=torch.int64)}
    with refuses(RuntimeError, "has 1 rows, but there are no centroids"):
        index.load_state_dict({**index.state_dict(), **row})


def test_rocm_needs_a_torch_for_it():
    if torch.version.hip:
        pytest.skip("this torch has ROCm")
    with refuses(RuntimeError, "no ROCm", ".cuda()"):
        IndexFlatL2(D).rocm()


# --- faiss --------------------------------------------------------------------------------------------------


def test_an_id_map_that_lost_ids_is_refused(faiss):
    theirs = faiss.IndexIDMap(faiss.index_factory(D, "IVF2,Flat"))
    x = normal(100, D).numpy()
    theirs.train(x)
    theirs.add_with_ids(x, numpy.arange(100) + 1000)
    theirs.remove_ids(numpy.arange(1000, 1050))
    with refuses(ValueError, "index has fewer ids than vectors"):
        from_faiss(theirs)


def test_vectors_of_faiss_that_belong_to_an_index_are_not_replaced():
    vector = Vector(numpy.arange(3.0))
    with refuses(Unsupported, "does not let this vector be replaced"):
        copy_array_to_vector(numpy.zeros(3), vector)
    assert (vector.at(1), vector.data().tolist(), vector_to_array(vector).tolist()) == (1.0, [0, 1, 2], [0, 1, 2])
    assert rev_swig_ptr(vector.data(), 2).tolist() == [0, 1]


def test_flat_indexes_that_do_not_fit_are_not_merged():
    x = normal(5, D).numpy()
    one, other, wider = IndexFlat(D), IndexFlat(D), IndexFlat(D + 1)
    one.add(x)
    other.add(x)
    with refuses(RuntimeError, "add_id must be 0, got 7"):
        one.merge_from(other, 7)
    with refuses(RuntimeError, "cannot be merged into"):
        one.merge_from(wider)
    assert (one.ntotal, other.ntotal) == (5, 5)


def test_indexes_with_other_transforms_are_not_merged():
    x = normal(300, D).numpy()
    one, other, plain = (index_factory(D, key) for key in ("PCA2,Flat", "PCA2,Flat", "Flat"))
    one.train(x)
    other.train(x + x[:, ::-1])
    with refuses(RuntimeError, "the transforms of the two indexes differ"):
        one.check_compatible_for_merge(other)
    with refuses(RuntimeError, "cannot be merged into"):
        one.check_compatible_for_merge(plain)


def test_lists_that_a_caller_gives_must_be_for_the_queries():
    index = index_factory(D, "IVF2,Flat")
    x = normal(100, D).numpy()
    index.train(x)
    index.add(x)
    with refuses(AssertionError, "Iq must have shape (3, nprobe), got (2, 1)"):
        index.search_preassigned(x[:3], 1, numpy.zeros((2, 1), "int64"), numpy.zeros((2, 1), "float32"))


def test_calls_that_come_too_early_or_to_the_wrong_device():
    with refuses(AssertionError, "train the centroids"):
        Kmeans(D, 2).assign(normal(3, D).numpy())
    with refuses(RuntimeError, "reverse_transform is not implemented for VectorTransform"):
        VectorTransform.back(VectorTransform.__new__(VectorTransform), normal(1, D))
    with refuses(AttributeError, "IndexFlat is on the CPU"):
        _ = IndexFlat(D).getDevice
    with refuses(RuntimeError, "there is no GPU"):
        index_cpu_to_gpus_list(IndexFlat(D), gpus=[])


# --- commands -----------------------------------------------------------------------------------------------


def test_commands_refuse_what_they_cannot_do(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    inner = filled(IndexFlatL2(D))
    IndexPreTransform(D, nn.Sequential(nn.Linear(D, D)), inner).save("transformed.pt")
    numpy.save("queries.npy", normal(3, D).numpy())
    inner.save("plain.pt")
    assert cli.main(["export", "transformed.pt", "--format", "torchscript"]) == 1
    assert "is an IndexPreTransform" in capsys.readouterr().err
    assert cli.main(["search", "plain.pt", "queries.npy", "--ids", "found.txt"]) == 1
    assert "the file name must end in .npy, got found.txt" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        cli.main(["search", "plain.pt", "queries.npy", "--device", "nowhere"])
    assert "'nowhere' cannot be used here" in capsys.readouterr().err


def test_build_native_says_what_it_did_or_why_not(tmp_path, monkeypatch, capsys):
    file = tmp_path / "kernel.so"
    file.write_bytes(b"123")
    monkeypatch.setattr(native, "build", lambda again: file)
    assert cli.main(["build-native", "--json"]) == 0
    assert '"bytes": 3' in capsys.readouterr().out

    def refused(again):
        raise RuntimeError("there is no C++ compiler")

    monkeypatch.setattr(native, "build", refused)
    assert cli.main(["build-native"]) == 1
    assert "there is no C++ compiler" in capsys.readouterr().err


# --- choices ------------------------------------------------------------------------------------------------


def test_without_a_kernel_many_queries_of_a_few_lists_are_searched_list_by_list():
    index = IndexIVFFlat(64, nlist=8, nprobe=8)
    index.train(normal(4_000, 64)).add(normal(4_000, 64))
    queries = normal(400, 64, seed=1)
    with native.disabled():
        D_auto, I_auto = index.search(queries, 3, params=SearchParams(debug_stats=True))
        assert index.last_search_stats["mode"] == "csr"
        index.search_mode = "matrix"
        D_matrix, I_matrix = index.search(queries, 3)
    torch.testing.assert_close(D_auto, D_matrix)
    assert torch.equal(I_auto, I_matrix)
