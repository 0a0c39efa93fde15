"""faiss_compat beside faiss: the same calls on the same data, and the same answers."""

from __future__ import annotations

import copy
import pickle

import numpy as np
import pytest
import torch

import torch_ivf_module.faiss_compat as compat

D, N, Q, K = 16, 600, 20, 7
RS = np.random.RandomState(3)
XB, XQ = RS.randn(N, D).astype("float32"), RS.randn(Q, D).astype("float32")
IDS = RS.permutation(5 * N)[:N].astype("int64")
CENTROIDS = XB[:: N // 10][:10].copy()
METRICS = ["METRIC_L2", "METRIC_INNER_PRODUCT"]
each_metric = pytest.mark.parametrize("metric", METRICS)


def flat(module, metric="METRIC_L2"):
    return module.IndexFlat(D, getattr(module, metric))


def ivf(module, metric="METRIC_L2", own_metric=None, nprobe=3):
    """An inverted file with the same centroids in both libraries; `own_metric` is that of the quantizer."""
    quantizer = module.IndexFlat(D, getattr(module, own_metric or metric))
    quantizer.add(CENTROIDS)
    index = module.IndexIVFFlat(quantizer, D, len(CENTROIDS), getattr(module, metric))
    index.nprobe = nprobe
    return index


def id_map(module, metric="METRIC_L2"):
    return module.IndexIDMap2(flat(module, metric))


def id_map_ivf(module, metric="METRIC_L2"):
    return module.IndexIDMap2(ivf(module, metric))


def normalised(module, metric="METRIC_L2"):
    return module.IndexPreTransform(module.NormalizationTransform(D, 2.0), flat(module, metric))


KINDS = {"flat": flat, "ivf": ivf, "id_map": id_map, "id_map_ivf": id_map_ivf, "normalised": normalised}
each_kind = pytest.mark.parametrize("kind", KINDS)


def filled(faiss, kind, metric="METRIC_L2"):
    """A filled index of faiss and the same of faiss_compat."""
    indexes = [KINDS[kind](module, metric) for module in (faiss, compat)]
    for index in indexes:
        if kind.startswith("id_map"):
            index.add_with_ids(XB, IDS)
        else:
            index.add(XB)
    return indexes


def readable(faiss, kind, metric):
    """`filled`, and made so that faiss finds vectors by id too."""
    indexes = filled(faiss, kind, metric)
    if "ivf" in kind:
        faiss.extract_index_ivf(indexes[0]).make_direct_map()
    return indexes


def same(theirs, ours):
    """Assert that two results are the same, up to rounding of floats; kinds and dtypes too."""
    assert len(theirs) == len(ours)
    for expected, found in zip(theirs, ours, strict=True):
        assert type(found) is type(expected) is np.ndarray
        assert found.dtype == expected.dtype
        if expected.dtype.kind == "f":
            np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)
        else:
            np.testing.assert_array_equal(found, expected)


def both(indexes, call):
    """Assert that a call gives the same for both indexes."""
    theirs, ours = map(call, indexes)
    same(*(part if isinstance(part, tuple) else (np.asarray(part),) for part in (theirs, ours)))


def ranges(lims, D, I):
    """The results of a search by radius, those of each query sorted by id."""
    assert lims.dtype == np.uint64
    order = [np.argsort(I[a:b]) + a for a, b in zip(lims[:-1].astype(int), lims[1:].astype(int), strict=True)]
    order = np.concatenate(order).astype(int)
    return lims, D[order], I[order]


# -- searching -----------------------------------------------------------------------------------------------


@each_metric
@each_kind
def test_search(faiss, kind, metric):
    indexes = filled(faiss, kind, metric)
    both(indexes, lambda index: index.search(XQ, K))
    both(indexes, lambda index: index.assign(XQ, 2))
    both(indexes, lambda index: index.search(np.asfortranarray(XQ.astype("float64")), 1))
    both(indexes, lambda index: index.search(XQ[:0], K))


@each_metric
@each_kind
def test_padding(faiss, kind, metric):
    indexes = filled(faiss, kind, metric)
    both(indexes, lambda index: index.search(XQ, N + 3))
    both(indexes, lambda index: index.search(np.full((2, D), np.nan, "float32"), 2))
    for index in indexes:
        index.reset()
        assert index.ntotal == 0
    both(indexes, lambda index: index.search(XQ, 2))


@each_metric
@each_kind
def test_search_into_arrays(faiss, kind, metric):
    outputs = []
    for index in readable(faiss, kind, metric):
        D, I, R = np.empty((Q, K), "f"), np.empty((Q, K), "int64"), np.empty((Q, K, XQ.shape[1]), "f")
        found = index.search(XQ, K, D=D, I=I)
        assert found[0] is D
        assert found[1] is I
        index.search_and_reconstruct(XQ, K, R=R)
        outputs.append((D, I, R))
    same(*outputs)
    with pytest.raises(AssertionError, match="must have shape"):
        compat.IndexFlatL2(D.shape[1]).search(D, 2, D=D)


@each_metric
@each_kind
def test_range_search(faiss, kind, metric):
    thresholds = {"METRIC_L2": 1.0 if kind == "normalised" else 20.0, "METRIC_INNER_PRODUCT": 0.4}
    both(filled(faiss, kind, metric), lambda index: ranges(*index.range_search(XQ, thresholds[metric])))
    both(filled(faiss, kind, metric), lambda index: index.range_search(XQ, 0.0 if metric == "METRIC_L2" else 1e6))


@each_metric
@each_kind
def test_vectors_by_id(faiss, kind, metric):
    indexes = readable(faiss, kind, metric)
    keys = IDS[:5] if kind.startswith("id_map") else np.arange(3, 8)
    both(indexes, lambda index: index.search_and_reconstruct(XQ, K))
    both(indexes, lambda index: index.reconstruct(int(keys[2])))
    both(indexes, lambda index: index.reconstruct_batch(keys))
    if not kind.startswith("id_map"):
        both(indexes, lambda index: index.reconstruct_n(4, 9))
        both(indexes, lambda index: index.reconstruct_n(x=np.empty((N, D), "f")))
        assert indexes[1].reconstruct_n().shape == (N, D)
    for index in indexes:
        with pytest.raises(RuntimeError):
            index.reconstruct(10**6)


@pytest.mark.parametrize("own_metric", METRICS)
@each_metric
def test_a_quantizer_of_either_metric(faiss, metric, own_metric):
    indexes = [ivf(module, metric, own_metric) for module in (faiss, compat)]
    for index in indexes:
        assert index.is_trained
        index.add(XB)
        index.add_with_ids(XB[:50] / 2, np.arange(1000, 1050))
    both(indexes, lambda index: index.search(XQ, K))
    both(indexes, lambda index: ranges(*index.range_search(XQ, 10.0)))
    both(indexes, lambda index: index.search_and_reconstruct(XQ, K))
    both(indexes, lambda index: np.array([index.invlists.list_size(l) for l in range(10)]))
    lists = RS.randint(10, size=(Q, 3))
    both(indexes, lambda index: index.search_preassigned(XQ, K, lists, None))
    both(indexes, lambda index: ranges(*index.range_search_preassigned(XQ, 10.0, lists, None)))


# -- settings of a search ------------------------------------------------------------------------------------

BITMAP = np.packbits(RS.randint(2, size=2400), bitorder="little")
# In a flat index faiss reads outside of its memory for an array or a range of ids that it does not have.
SELECTORS = {
    "batch": lambda faiss: faiss.IDSelectorBatch(IDS[::3]),
    "array": lambda faiss: faiss.IDSelectorArray(IDS[IDS < N]),
    "range": lambda faiss: faiss.IDSelectorRange(100, 900),
    "bitmap": lambda faiss: faiss.IDSelectorBitmap(BITMAP),
    "all": lambda faiss: faiss.IDSelectorAll(),
    "not": lambda faiss: faiss.IDSelectorNot(faiss.IDSelectorRange(100, 900)),
    "and": lambda faiss: faiss.IDSelectorAnd(faiss.IDSelectorRange(0, 500), faiss.IDSelectorBatch(IDS[::2])),
    "or": lambda faiss: faiss.IDSelectorOr(faiss.IDSelectorRange(0, 100), faiss.IDSelectorBatch(IDS[::9])),
    "xor": lambda faiss: faiss.IDSelectorXOr(faiss.IDSelectorRange(0, 500), faiss.IDSelectorBatch(IDS[::2])),
    "none": lambda faiss: faiss.IDSelectorBatch(np.array([10**6])),
}


@pytest.mark.parametrize("which", SELECTORS)
@each_kind
def test_selectors(faiss, kind, which):
    make, indexes = SELECTORS[which], filled(faiss, kind)
    selectors = [make(module) for module in (faiss, compat)]
    for id in (0, 99, 100, 899, 900, *IDS[:12].tolist(), 19_999):
        assert selectors[1].is_member(id) is bool(selectors[0].is_member(id))
    name = "SearchParametersIVF" if "ivf" in kind else "SearchParameters"
    settings = {"nprobe": 4} if "ivf" in kind else {}
    params = [
        getattr(module, name)(sel=sel, **settings) for module, sel in zip((faiss, compat), selectors, strict=True)
    ]
    same(*(index.search(XQ, K, params=given) for index, given in zip(indexes, params, strict=True)))
    found = [index.range_search(XQ, 15.0, params=given) for index, given in zip(indexes, params, strict=True)]
    same(*(ranges(*part) for part in found))
    counts = [index.remove_ids(selector) for index, selector in zip(indexes, selectors, strict=True)]
    assert counts[0] == counts[1] == N - indexes[1].ntotal
    if kind != "id_map_ivf":  # of which faiss loses the ids
        both(indexes, lambda index: index.search(XQ, K))


def test_parameters_of_an_inverted_file(faiss):
    indexes = filled(faiss, "ivf")
    for nprobe in (1, 5, 10, 99):
        pairs = zip(indexes, (faiss, compat), strict=True)
        same(*(index.search(XQ, K, params=module.SearchParametersIVF(nprobe=nprobe)) for index, module in pairs))
    assert compat.SearchParametersIVF().nprobe == faiss.SearchParametersIVF().nprobe == 1
    for module, index in zip((faiss, compat), indexes, strict=True):
        with pytest.raises(RuntimeError):
            index.search(XQ, K, params=module.SearchParameters())
        with pytest.raises(AssertionError):
            module.SearchParametersIVF(nprobes=3)
        space = module.ParameterSpace()
        space.set_index_parameter(index, "nprobe", 6)
        assert index.nprobe == 6
        space.set_index_parameters(index, "nprobe=2")
        assert index.nprobe == 2
        with pytest.raises(RuntimeError):
            space.set_index_parameter(index, "nprobes", 3)
    both(indexes, lambda index: index.search(XQ, K))


def test_settings_behind_a_transform(faiss):
    for module in (faiss, compat):
        index = module.IndexPreTransform(module.NormalizationTransform(D), ivf(module))
        index.add(XB)
        params = module.SearchParametersPreTransform(index_params=module.SearchParametersIVF(nprobe=10))
        expected = normalised(module)
        expected.add(XB)
        np.testing.assert_array_equal(index.search(XQ, K, params=params)[1], expected.search(XQ, K)[1])
        assert module.extract_index_ivf(index).nlist == 10


# -- changing ------------------------------------------------------------------------------------------------


@each_kind
def test_removing_and_adding(faiss, kind):
    indexes = filled(faiss, kind)
    gone = IDS[:100] if kind.startswith("id_map") else np.arange(0, N, 3)
    for index in indexes:
        assert index.remove_ids(np.append(gone, 10**7)) == len(gone)
        assert index.remove_ids(gone[:0]) == 0
        if kind == "id_map":
            index.add_with_ids(XB[:30] + 1, np.arange(30) + 10_000)
        elif kind != "id_map_ivf":
            index.add(XB[:30] + 1)
    if kind != "id_map_ivf":  # of which faiss loses the ids
        both(indexes, lambda index: index.search(XQ, K))
    if kind == "flat":
        both(indexes, lambda index: index.reconstruct_n(0, index.ntotal))


def test_ids_of_a_map_survive_removals_from_an_inverted_file():
    index = id_map_ivf(compat)
    index.add_with_ids(XB, IDS)
    index.remove_ids(IDS[:100])
    np.testing.assert_array_equal(index.reconstruct(int(IDS[200])), XB[200])
    assert not np.isin(index.search(XQ, K)[1], IDS[:100]).any()


def without_last(distances, ids):
    """ids (nq, k) without those of the last distance, which may be that of one more vector: any of them is right."""
    return np.where(np.isclose(distances, distances[:, -1:]), -1, ids)


@each_kind
def test_merging(faiss, kind):
    indexes, others = filled(faiss, kind), filled(faiss, kind)
    add_id = 0 if kind in ("flat", "normalised") else 50_000
    for index, other in zip(indexes, others, strict=True):
        other.remove_ids(IDS[:40])
        left = other.ntotal
        index.merge_from(other, add_id)
        assert index.ntotal == N + left
    assert others[1].ntotal == 0  # faiss forgets to say so of an index behind a transform
    if kind != "id_map_ivf":
        both(indexes, lambda index: index.search(XQ, 2 * K)[0])
        # Most distances are there twice.
        both(indexes, lambda index: np.sort(without_last(*index.search(XQ, 2 * K)), 1))


@pytest.mark.parametrize("own_metric", METRICS)
def test_updating_and_copying_a_subset(faiss, own_metric):
    indexes = [ivf(module, "METRIC_L2", own_metric) for module in (faiss, compat)]
    others = [ivf(module, "METRIC_L2", own_metric) for module in (faiss, compat)]
    for index, other in zip(indexes, others, strict=True):
        index.add(XB)
        index.make_direct_map()
        index.update_vectors(np.arange(100), XB[99::-1].copy())
        index.copy_subset_to(other, 0, 20, 180)
        index.copy_subset_to(other, 1, 7, 3)
        assert index.ntotal == N
    both(indexes, lambda index: index.search(XQ, K))
    both(indexes, lambda index: index.reconstruct_n(0, 120))
    both(others, lambda index: np.sort(index.search(XQ, K)[0], 1))
    with pytest.raises(RuntimeError):
        indexes[1].update_vectors(np.array([10**6]), XB[:1])
    with pytest.raises(compat.Unsupported, match="type 0 and 1"):
        indexes[1].copy_subset_to(others[1], 3, 0, 1)


@each_kind
def test_kinds_and_sizes(faiss, kind):
    theirs, ours = filled(faiss, kind)
    for name in ("d", "ntotal", "is_trained", "metric_type", "verbose", "metric_arg"):
        assert getattr(ours, name) == getattr(theirs, name), name
    assert type(ours).__name__ == type(theirs).__name__
    assert isinstance(ours, compat.Index)
    assert ours.sa_code_size() == 4 * D
    assert compat.downcast_index(ours) is ours


def test_training(faiss):
    for module in (faiss, compat):
        quantizer = module.IndexFlatL2(D)
        index = module.IndexIVFFlat(quantizer, D, 8)
        assert (index.is_trained, index.nprobe, index.max_codes, index.nlist) == (False, 1, 0, 8)
        with pytest.raises(RuntimeError):
            index.add(XB)
        with pytest.raises(RuntimeError):
            index.search(XQ, 1)
        with pytest.raises(RuntimeError):
            index.train(XB[:5])
        index.cp.niter, index.cp.min_points_per_centroid = 4, 1
        index.train(XB)
        assert index.is_trained
        assert quantizer.ntotal == index.quantizer.ntotal == 8
        before = quantizer.reconstruct_n(0, 8)
        index.train(XB[:50])  # it has its centroids
        np.testing.assert_array_equal(quantizer.reconstruct_n(0, 8), before)
        index.add(XB)
        assert sum(index.get_list_size(l) for l in range(8)) == index.invlists.compute_ntotal() == N
        index.nprobe = 8
        np.testing.assert_array_equal(index.search(XB[:20], 1)[1][:, 0], np.arange(20))


def test_few_training_rows_are_warned_of():
    index = compat.IndexIVFFlat(compat.IndexFlatL2(D), D, 32)
    with pytest.warns(UserWarning, match="training rows for 32 centroids"):
        index.train(XB)


def test_centroids_follow_the_quantizer():
    quantizer = compat.IndexFlatL2(D)
    index = compat.IndexIVFFlat(quantizer, D, 10)
    assert not index.is_trained
    quantizer.add(CENTROIDS)
    index.is_trained = True  # as faiss's users write
    assert index.is_trained
    index.add(XB)
    expected = ivf(compat)
    expected.add(XB)
    for copied in (index, copy.deepcopy(index), pickle.loads(pickle.dumps(index))):
        copied.nprobe = 3
        same(expected.search(XQ, K), copied.search(XQ, K))


# -- errors --------------------------------------------------------------------------------------------------


def test_errors_have_the_kinds_of_faiss(faiss):
    for module in (faiss, compat):
        index = flat(module)
        index.add(XB)
        for wrong in (XQ[:, :3], XQ[:, :0]):
            with pytest.raises(AssertionError):
                index.search(wrong, 1)
        with pytest.raises(AssertionError):
            index.search(XQ, 0)
        with pytest.raises(RuntimeError):
            index.add_with_ids(XB, IDS)
        with pytest.raises(RuntimeError):
            index.reconstruct(N)
        with pytest.raises(AttributeError):
            index.nprobe = 3
        with pytest.raises(RuntimeError):
            module.IndexIDMap(index)
        mapped = module.IndexIDMap(flat(module))
        with pytest.raises(AssertionError):
            mapped.add_with_ids(XB, IDS[:3])
        with pytest.raises(RuntimeError):
            mapped.add(XB)
        mapped.add_with_ids(XB, IDS)
        with pytest.raises(RuntimeError):
            mapped.reconstruct(int(IDS[0]))
        with pytest.raises(RuntimeError):
            module.index_factory(D, "nothing")
        with pytest.raises(RuntimeError):
            module.extract_index_ivf(index)
        assert module.try_extract_index_ivf(index) is None


def test_what_is_not_here_is_named():
    with pytest.raises(compat.Unsupported, match=r"no 'IndexHNSWFlat'.*IndexIVFFlat"):
        _ = compat.IndexHNSWFlat
    assert not hasattr(compat, "IndexPQ")
    for call in (
        lambda: compat.index_factory(D, "IVF4,PQ8"),
        lambda: compat.IndexFlat(D, compat.METRIC_L1),
        lambda: compat.IndexScalarQuantizer(D, compat.ScalarQuantizer.QT_6bit),
        lambda: compat.IndexIVFFlat(compat.index_factory(D, "IDMap,Flat"), D, 4),
        lambda: compat.Kmeans(D, 4, int_centroids=True),
        lambda: compat.Kmeans(D, 4).train(XB, weights=np.ones(N)),
        lambda: compat.NormalizationTransform(D, 1.0),
    ):
        with pytest.raises(RuntimeError) as caught:
            call()
        assert isinstance(caught.value, compat.Unsupported)


def test_constants_have_the_values_of_faiss(faiss):
    numbers = {name: value for name in compat.__all__ if isinstance(value := getattr(compat, name), int)}
    assert {"METRIC_L2", "Int8", "IO_FLAG_MMAP"} <= numbers.keys()
    assert numbers == {name: getattr(faiss, name) for name in numbers}


def test_an_attribute_that_is_not_here_is_named():
    codes = compat.IndexScalarQuantizer(D, compat.ScalarQuantizer.QT_8bit)
    with pytest.raises(compat.Unsupported, match=r"IndexScalarQuantizer has no attribute 'sq'; it has .*code_size"):
        _ = codes.sq
    with pytest.raises(compat.Unsupported, match=r"IndexIVFFlat has no attribute 'npobe'; it has .*nprobe"):
        ivf(compat).npobe = 4
    with pytest.raises(compat.Unsupported, match=r"PCAMatrix has no attribute 'PCAMat'; it has .*d_out"):
        _ = compat.PCAMatrix(D, 4).PCAMat
    with pytest.raises(compat.Unsupported, match=r"IVF has no attribute 'max_lists_num'; it has .*nprobe"):
        _ = compat.SearchParametersIVF().max_lists_num
    with pytest.raises(AttributeError, match="on the CPU"):
        codes.getDevice()
    assert not hasattr(copy.deepcopy(codes), "sq")


def test_lists_are_those_of_the_centroids_that_a_quantizer_of_codes_stores():
    quantizer = compat.IndexScalarQuantizer(D, compat.ScalarQuantizer.QT_4bit)
    index = compat.IndexIVFFlat(quantizer, D, 8)
    index.train(XB)
    assert np.array_equal(index.module.centroids, quantizer.reconstruct_n(0, 8))
    index.add(XB)
    version = index.module.store.version
    same(index.search(XQ, K), index.search_preassigned(XQ, K, quantizer.assign(XQ, index.nprobe)))
    assert index.module.store.version is version


def test_a_failed_call_changes_nothing():
    index = ivf(compat)
    index.add(XB)
    before = index.search(XQ, K)
    wrong = XB[:3].copy()
    wrong[1, 2] = np.nan
    with pytest.raises(RuntimeError, match="row 1"):
        index.add(wrong)
    with pytest.raises(RuntimeError):
        index.merge_from(flat(compat))
    assert index.ntotal == N
    same(before, index.search(XQ, K))


def test_vectors_are_tensors_of_a_module():
    index = ivf(compat)
    index.add(XB)
    assert isinstance(index.module, torch.nn.Module)
    assert index.module.ntotal == N
