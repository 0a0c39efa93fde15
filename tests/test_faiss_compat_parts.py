"""faiss_compat beside faiss: transforms, k-means, factory strings, functions, half precision, tensors."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch

import torch_ivf_module.faiss_compat as compat
from tests.problems import defaults
from tests.test_faiss_compat import CENTROIDS, IDS, METRICS, XB, XQ, D, K, N, Q, both, flat, ivf, same
from torch_ivf_module.faiss_compat.arrays import use_tensors
from torch_ivf_module.faiss_compat.contrib import inspect_tools

# -- transforms ----------------------------------------------------------------------------------------------


def test_pca(faiss):
    x = XB * np.linspace(1, 5, D, dtype="float32") + 3
    for power in (0.0, -0.5):
        theirs, ours = (module.PCAMatrix(D, 5, power) for module in (faiss, compat))
        for transform in (theirs, ours):
            assert not transform.is_trained
            with pytest.raises(RuntimeError):
                transform.apply(x)
            transform.train(x)
            assert transform.is_trained
            assert (transform.d_in, transform.d_out) == (D, 5)
        scale = 1 if power else np.abs(x).max()
        np.testing.assert_allclose(np.abs(ours.apply(x)), np.abs(theirs.apply(x)), atol=2e-3 * scale)
        for name in ("mean", "eigenvalues", "A", "b"):
            expected, found = faiss.vector_to_array(getattr(theirs, name)), getattr(ours, name)
            assert found.size() >= (5 if name == "b" else D)
            expected, found = np.abs(expected)[: found.size()], np.abs(compat.vector_to_array(found))[: len(expected)]
            np.testing.assert_allclose(found, expected, rtol=1e-3, atol=2e-3 * expected.max())
    back = compat.PCAMatrix(D, D)
    back.train(x)
    np.testing.assert_allclose(back.reverse_transform(back.apply(x)), x, atol=1e-3)


def test_linear_transforms():
    rotation = compat.RandomRotationMatrix(D, D)
    rotation.train(XB)
    np.testing.assert_allclose(rotation.reverse_transform(rotation.apply(XB)), XB, atol=1e-5)
    np.testing.assert_allclose(compat.pairwise_distances(*[rotation.apply(x) for x in (XQ, XB)]),
                               compat.pairwise_distances(XQ, XB), rtol=1e-4)
    centred = compat.CenteringTransform(D)
    centred.train(XB)
    np.testing.assert_allclose(centred.apply(XB), XB - XB.mean(0), atol=1e-5)
    linear = compat.LinearTransform(D, 2, True)
    linear.A = XB[:2] * 3
    linear.b = np.ones(2)
    copied = compat.LinearTransform(D, 2, True)
    compat.copy_array_to_vector(XB[:2].ravel() * 3, copied.A)
    compat.copy_array_to_vector(np.ones(2, "f"), copied.b)
    copied.is_trained = True
    np.testing.assert_array_equal(copied.apply(XQ), linear.apply(XQ))
    matrix, bias = inspect_tools.get_LinearTransform_matrix(copied)
    again = inspect_tools.make_LinearTransform_matrix(matrix, bias)
    np.testing.assert_array_equal(again.apply(XQ), linear.apply(XQ))
    np.testing.assert_allclose(linear.apply(XQ), XQ @ XB[:2].T * 3 + 1, rtol=1e-4)
    with pytest.raises(RuntimeError, match="orthonormal"):
        linear.reverse_transform(XB[:, :2])


def test_opq_lowers_the_error_of_a_product_quantizer():
    x = (np.random.RandomState(0).randn(3000, 8) @ np.diag([9, 7, 5, 3, 1, 1, 1, 1])).astype("float32")
    transform = compat.OPQMatrix(8, 2)
    transform.ncentroids, transform.niter = 16, 6
    transform.train(x)
    assert transform.is_orthonormal

    def error(y):
        total = 0.0
        for part in np.split(y, 2, axis=1):
            clusters = compat.Kmeans(4, 16, niter=10)
            total += clusters.train(np.ascontiguousarray(part))
        return total

    assert error(transform.apply(x)) < 0.9 * error(x)


@pytest.mark.parametrize("metric", METRICS)
def test_behind_transforms(faiss, metric):
    expected = None
    for module in (faiss, compat):
        inner = module.IndexFlat(5, getattr(module, metric))
        index = module.IndexPreTransform(module.PCAMatrix(D, 5), inner)
        index.prepend_transform(module.NormalizationTransform(D))
        assert (index.d, index.chain.size(), index.is_trained) == (D, 2, False)
        index.train(XB)
        index.add(XB)
        assert index.ntotal == index.index.ntotal == N
        found, ids, vectors = index.search_and_reconstruct(XB[:9], 3)
        if metric == "METRIC_L2":
            np.testing.assert_array_equal(ids[:, 0], np.arange(9))
            np.testing.assert_allclose(index.reconstruct_n(0, 9), vectors[:, 0], atol=1e-5)
        if expected is not None:
            same([expected[0]], [found])
            np.testing.assert_array_equal(expected[1], ids)
            np.testing.assert_allclose(expected[2], vectors, atol=1e-4)
        expected = found, ids, vectors
        assert index.remove_ids(np.arange(4)) == 4
        assert index.search(XB[4:5], 1)[1][0, 0] == 0 or metric != "METRIC_L2"
    with pytest.raises(RuntimeError, match="dimension 16"):
        index.prepend_transform(module.PCAMatrix(D, 5))


def test_a_map_and_transforms_in_either_order():
    for description in ("IDMap2,PCA8,Flat", "PCA8,IDMap2,Flat"):
        index = compat.index_factory(D, description)
        index.train(XB)
        index.add_with_ids(XB, IDS)
        np.testing.assert_array_equal(index.search(XB[:9], 1)[1][:, 0], IDS[:9])
        assert index.remove_ids(IDS[:5]) == 5
        assert index.ntotal == N - 5


# -- k-means -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("spherical", [False, True])
def test_kmeans(faiss, spherical):
    results = []
    for module in (faiss, compat):
        kmeans = module.Kmeans(D, 8, niter=12, seed=5, spherical=spherical, min_points_per_centroid=1)
        final = kmeans.train(XB)
        assert kmeans.centroids.shape == (8, D)
        assert kmeans.centroids.dtype == np.float32
        assert kmeans.obj[-1] == pytest.approx(final)
        assert kmeans.index.ntotal == 8
        assert kmeans.iteration_stats[-1]["obj"] == kmeans.obj[-1]
        distances, assigned = kmeans.assign(XB)
        assert distances.shape == assigned.shape == (N,)
        results.append(final)
    assert results[1] == pytest.approx(results[0], rel=0.05)


def test_kmeans_from_given_centroids(faiss):
    results = []
    for module in (faiss, compat):
        kmeans = module.Kmeans(D, 10, niter=3, min_points_per_centroid=1)
        kmeans.train(XB, init_centroids=CENTROIDS)
        results.append([kmeans.centroids, kmeans.obj[:3].astype("float32")])
    np.testing.assert_allclose(results[1][0], results[0][0], atol=1e-3)
    np.testing.assert_allclose(results[1][1], results[0][1], rtol=1e-4)


def test_clustering_and_redoing(faiss):
    x = XB[:200]
    for module in (faiss, compat):
        clustering = module.Clustering(D, 10)
        clustering.niter, clustering.min_points_per_centroid, clustering.nredo = 2, 1, 3
        index = module.IndexFlatL2(D)
        clustering.train(x, index)
        centroids = module.vector_float_to_array(clustering.centroids).reshape(10, D)
        np.testing.assert_allclose(index.reconstruct_n(0, 10), centroids)
        assert clustering.iteration_stats.at(clustering.iteration_stats.size() - 1).obj > 0
        with pytest.raises(RuntimeError):
            clustering.train(x[:9], index)
    objectives = []
    for nredo in (1, 5):
        kmeans = compat.Kmeans(D, 10, niter=2, nredo=nredo, min_points_per_centroid=1)
        objectives.append(kmeans.train(x))
    assert objectives[1] <= objectives[0]
    with pytest.warns(UserWarning, match="training rows for 30 centroids"):
        compat.Kmeans(D, 30).train(x)


# -- factory strings and half precision ----------------------------------------------------------------------

STRINGS = [
    "Flat", "IVF4,Flat", "IDMap,Flat", "IDMap2,Flat", "PCA8,Flat", "L2norm,Flat", "PCAR8,IVF4,Flat", "OPQ2_8,Flat",
    "RR8,Flat", "PCA8,L2norm,IVF4,Flat", "IVF4(Flat),Flat", "IDMap,IVF4,Flat", "SQfp16", "IVF4,SQfp16", "SQbf16",
    "IDMap2,PCAW4,IVF4,Flat",
]  # fmt: skip


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("description", STRINGS)
def test_factory_strings(faiss, description, metric):
    theirs, ours = (module.index_factory(D, description, getattr(module, metric)) for module in (faiss, compat))

    kept = []  # faiss frees an index with the one around it
    while True:
        assert type(ours).__name__ == type(theirs).__name__
        assert (ours.d, ours.metric_type, ours.is_trained) == (theirs.d, theirs.metric_type, theirs.is_trained)
        if not hasattr(theirs, "index"):
            break
        kept.append(theirs)
        theirs, ours = faiss.downcast_index(theirs.index), ours.index


@pytest.mark.parametrize("kind", ["QT_fp16", "QT_bf16"])
@pytest.mark.parametrize("metric", METRICS)
def test_half_precision(faiss, kind, metric):
    answers = []
    for module in (faiss, compat):
        index = module.IndexScalarQuantizer(D, getattr(module.ScalarQuantizer, kind), getattr(module, metric))
        index.train(XB)
        index.add(XB)
        assert index.sa_code_size() == 2 * D
        answers.append(index.search(XQ, K))
        quantizer = module.IndexFlat(D, getattr(module, metric))
        quantizer.add(CENTROIDS)
        qtype = getattr(module.ScalarQuantizer, kind)
        lists = module.IndexIVFScalarQuantizer(quantizer, D, 10, qtype, getattr(module, metric), False)
        lists.train(XB)
        lists.add(XB)
        lists.nprobe = 10  # faiss chooses the list of a vector before rounding it
        answers.append(lists.search(XQ, K))
    same(answers[0], answers[2])
    same(answers[1], answers[3])


@pytest.mark.parametrize("description", ["SQ8", "SQ4", "IVF4,SQ8", "IDMap2,SQ8", "L2norm,IVF4,SQ4"])
@pytest.mark.parametrize("metric", METRICS)
def test_codes(description, metric):
    exact = description.replace("SQ8", "Flat").replace("SQ4", "Flat")
    index, exact = (compat.index_factory(D, text, getattr(compat, metric)) for text in (description, exact))
    for part in (index, exact):
        part.train(XB)
        if part.takes_ids:
            part.add_with_ids(XB, IDS)
        else:
            part.add(XB)
        if "IVF" in description:
            compat.extract_index_ivf(part).nprobe = 4
    assert index.sa_code_size() < exact.sa_code_size() / 2
    found, expected = index.search(XQ, K), exact.search(XQ, K)
    np.testing.assert_allclose(found[0], expected[0], rtol=0.2, atol=2.0 if "SQ4" in description else 0.2)
    recall = np.mean([len(set(a) & set(b)) / K for a, b in zip(found[1], expected[1], strict=True)])
    assert recall > (0.6 if "SQ4" in description else 0.9)
    same(found, compat.deserialize_index(compat.serialize_index(index)).search(XQ, K))
    removed = index.remove_ids(found[1][:, 0])
    assert removed == len(set(found[1][:, 0]))


# -- functions -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("metric", METRICS)
def test_neighbours_and_distances(faiss, metric):
    for k in (3, N + 2):
        same(*(module.knn(XQ, XB, k, getattr(module, metric)) for module in (faiss, compat)))
    same(*([module.pairwise_distances(XQ, XB, getattr(module, metric))] for module in (faiss, compat)))


def test_normalising_in_place(faiss):
    x = XB.copy()
    x[3] = 0
    expected, found, tensor = x.copy(), x.copy(), torch.from_numpy(x.copy())
    faiss.normalize_L2(expected)
    compat.normalize_L2(found)
    compat.normalize_L2(tensor)
    np.testing.assert_allclose(found, expected, rtol=1e-6)
    np.testing.assert_array_equal(tensor.numpy(), found)
    for wrong in (x.astype("float64"), np.asfortranarray(x), x[:, ::2]):
        with pytest.raises((TypeError, ValueError)):
            faiss.normalize_L2(wrong)
        with pytest.raises(TypeError, match="float32"):
            compat.normalize_L2(wrong)


def test_threads():
    before = torch.get_num_threads()
    try:
        compat.omp_set_num_threads(2)
        assert compat.omp_get_max_threads() == torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


def test_what_is_stored(faiss):
    theirs, ours = (ivf(module) for module in (faiss, compat))
    for index in (theirs, ours):
        index.add(XB)
    from faiss.contrib.inspect_tools import get_flat_data, get_invlist

    for number in range(10):
        same(get_invlist(theirs.invlists, number), inspect_tools.get_invlist(ours.invlists, number))
        assert ours.get_list_size(number) == theirs.get_list_size(number)
    assert inspect_tools.get_invlist_sizes(ours.invlists).sum() == N
    assert ours.invlists.imbalance_factor() == pytest.approx(theirs.invlists.imbalance_factor())
    with pytest.raises(RuntimeError, match=r"0 .. 9"):
        ours.get_list_size(10)
    theirs, ours = (flat(module) for module in (faiss, compat))
    for index in (theirs, ours):
        index.add(XB)
    same([faiss.vector_to_array(theirs.codes)], [compat.vector_to_array(ours.codes)])
    same([get_flat_data(theirs)], [inspect_tools.get_flat_data(ours)])


# -- tensors -------------------------------------------------------------------------------------------------


@pytest.fixture
def torch_utils():
    """What ``import faiss.contrib.torch_utils`` asks for, for one test."""
    use_tensors(True)
    yield
    use_tensors(False)


def test_tensors_give_tensors():
    index, arrays = flat(compat), flat(compat)
    x, queries = torch.from_numpy(XB), torch.from_numpy(XQ)
    index.train(x)
    index.add(x)
    arrays.add(XB)
    expected = arrays.search(XQ, K)
    for given in (queries, queries.double(), queries.clone().requires_grad_()):
        found, ids = index.search(given, K)
        assert (found.dtype, ids.dtype, found.requires_grad) == (torch.float32, torch.int64, False)
        same(expected, (found.numpy(), ids.numpy()))
    assert index.assign(queries, 1).shape == (Q, 1)
    out = torch.empty(Q, K), torch.empty(Q, K, dtype=torch.int64)
    assert index.search(queries, K, D=out[0], I=out[1])[1] is out[1]
    same(expected, (out[0].numpy(), out[1].numpy()))
    lims, D, I = index.range_search(queries, 20.0)
    assert (lims.dtype, D.dtype, I.dtype) == (torch.int64, torch.float32, torch.int64)
    assert index.search_and_reconstruct(queries, 2)[2].shape == (Q, 2, XQ.shape[1])
    assert isinstance(index.reconstruct_batch(torch.tensor([1, 2])), torch.Tensor)
    assert isinstance(index.reconstruct(1, torch.empty(16)), torch.Tensor)
    assert isinstance(index.reconstruct(1), np.ndarray)
    assert index.remove_ids(torch.tensor([1])) == 1
    mapped = compat.IndexIDMap(flat(compat))
    mapped.add_with_ids(x, torch.from_numpy(IDS))
    assert torch.equal(mapped.search(x[:3], 1)[1][:, 0], torch.from_numpy(IDS[:3]))
    assert isinstance(compat.knn(queries, x, 2)[0], torch.Tensor)
    assert isinstance(compat.pairwise_distances(queries, x), torch.Tensor)


def test_torch_utils_make_reconstruct_give_tensors(torch_utils):
    index = flat(compat)
    index.add(XB)
    assert torch.equal(index.reconstruct(3), torch.from_numpy(XB[3]))
    assert torch.equal(index.reconstruct_n(0, 5), torch.from_numpy(XB[:5]))
    assert isinstance(index.reconstruct_n(0, 5, np.empty((5, D), "f")), np.ndarray)
    assert isinstance(index.search(XQ, 1)[0], np.ndarray)


# -- devices -------------------------------------------------------------------------------------------------


def test_moves_between_devices():
    index = ivf(compat)
    index.add(XB)
    assert compat.get_num_gpus() == torch.cuda.device_count()
    assert not hasattr(index, "getDevice")
    same(index.search(XQ, K), compat.index_gpu_to_cpu(index).search(XQ, K))
    if not torch.cuda.is_available():
        with pytest.raises(RuntimeError, match="no GPU"):
            compat.index_cpu_to_all_gpus(index)
        return
    resources = compat.StandardGpuResources()
    resources.setTempMemory(1 << 20)
    moved = compat.index_cpu_to_gpu(resources, 0, index)
    assert moved.getDevice() == 0
    assert moved.quantizer.getDevice() == 0
    assert index.device.type == "cpu"
    same(index.search(XQ, K), moved.search(XQ, K))
    assert moved.search(torch.from_numpy(XQ).cuda(), K)[1].is_cuda
    moved.add(XB[:5])
    assert compat.index_gpu_to_cpu(moved).ntotal == N + 5
    for all_gpus in (compat.index_cpu_to_all_gpus(index), compat.index_cpu_to_gpus_list(index, gpus=[0])):
        same(index.search(XQ, K), all_gpus.search(XQ, K))
    same(compat.knn_gpu(resources, XQ, XB, K), compat.knn(XQ, XB, K))


def test_the_default_device_and_dtype_change_nothing():
    expected = ivf(compat)
    expected.add(XB)
    with defaults("meta", torch.float64):
        index = compat.index_factory(D, "IDMap2,PCA8,IVF4,Flat")
        index.train(XB)
        index.add_with_ids(XB, IDS)
        np.testing.assert_array_equal(index.search(XB[:5], 1)[1][:, 0], IDS[:5])
        assert compat.Kmeans(D, 3).train(XB) > 0
        opq = compat.OPQMatrix(D, 2)
        opq.ncentroids, opq.niter = 4, 2
        opq.train(XB)
        plain = ivf(compat)
        plain.add(XB)
        params = compat.SearchParametersIVF(nprobe=3, sel=compat.IDSelectorRange(0, N))
        same(expected.search(XQ, K), plain.search(XQ, K, params=params))
        same(expected.search(XQ, K), compat.deserialize_index(compat.serialize_index(plain)).search(XQ, K))
        plain.remove_ids(compat.IDSelectorBitmap(np.array([3], "uint8")))
        assert plain.ntotal == N - 2
        mixed = ivf(compat, "METRIC_L2", "METRIC_INNER_PRODUCT")
        mixed.add(XB)
        assert mixed.search(XQ, K)[0].shape == (Q, K)
        whole = flat(compat)
        whole.add(XB)
        whole.remove_ids(np.arange(5))
        assert whole.reconstruct(0).shape == (D,)


def test_a_copy_is_another_index():
    index = ivf(compat)
    index.add(XB)
    for copied in (compat.clone_index(index), copy.copy(compat.clone_index(index))):
        copied.reset()
        copied.add(XB[:3])
        assert (copied.ntotal, index.ntotal, type(copied)) == (3, N, type(index))


def test_selectors_of_a_map(faiss):
    indexes = [module.IndexIDMap(flat(module)) for module in (faiss, compat)]
    for index in indexes:
        index.add_with_ids(XB, IDS)
    both(indexes, lambda index: index.search(XQ, K))
    same([faiss.vector_to_array(indexes[0].id_map)], [compat.vector_to_array(indexes[1].id_map)])


def test_vectors_that_a_quantizer_of_another_metric_cannot_place():
    index = ivf(compat, "METRIC_INNER_PRODUCT", "METRIC_L2")
    index.add(XB)
    bad = XB[:3].copy()
    bad[1, 0] = np.nan
    with pytest.raises(RuntimeError, match="row 1"):
        index.update_vectors(np.arange(3), bad)
    assert index.ntotal == N
    index.nprobe = index.nlist
    far = np.full((1, D), 1e25, dtype="float32")  # its squared distances overflow
    index.add(far)
    assert index.search(np.ones((1, D), dtype="float32"), 1)[1].tolist() == [[N]]


@pytest.mark.parametrize("qtype", ["QT_8bit", "QT_fp16"])
def test_centroids_in_a_scalar_quantizer(qtype):
    quantizer = compat.IndexScalarQuantizer(D, getattr(compat.ScalarQuantizer, qtype))
    quantizer.add(XB[:4])
    index = compat.IndexIVFFlat(quantizer, D, 4)
    index.add(XB)
    assert np.array_equal(index.module.centroids.numpy(), quantizer.reconstruct_n(0, 4))
    assert index.search(XB[:3], 1)[1].ravel().tolist() == [0, 1, 2]
