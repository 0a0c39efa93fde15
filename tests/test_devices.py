"""Other devices: an accelerator if there is one, else simulated devices.

A tensor that is created on the CPU by mistake causes no error on the CPU. Two simulations detect it without hardware:
torch's own fake tensors, which have a device and no data, for what needs no data; and those of simulated_device.py,
for code that reads values on the host.
"""

from __future__ import annotations

import itertools
from copy import deepcopy

import pytest
import torch
from torch._subclasses import FakeTensorMode

from tests.datasets import PROBLEMS, normal, problem
from tests.oracle import agree, check, probed, stored_rows
from tests.problems import DTYPES, METRICS, MODES, each_dtype, each_metric, each_mode, flat, shared
from tests.simulated_device import AWAY, away, back, moved
from tests.simulated_device import other_device as other_device
from tests.states import settings_of
from torch_ivf_module import IndexIVFFlat
from torch_ivf_module.functional import kmeans
from torch_ivf_module.functional.kernels import SCANS
from torch_ivf_module.functional.lists import ids_at
from torch_ivf_module.functional.probe import probe_by_ranking
from torch_ivf_module.functional.rescore import rescore
from torch_ivf_module.functional.scan_queries import scan_queries
from torch_ivf_module.functional.search import capped_lists, finite_queries, shifted_queries

CASE = problem("odd sizes")
PRESENT = [
    name
    for name, there in (
        ("cuda", torch.cuda.is_available()),
        ("mps", torch.backends.mps.is_available()),
        ("xpu", torch.xpu.is_available()),
    )
    if there
]


# --- an accelerator, if there is one ---------------------------------------------------------------------


ON_PRESENT = list(
    itertools.product(
        PRESENT,
        [case.name for case in PROBLEMS],
        MODES,
        DTYPES,
        METRICS,
    )
)


@pytest.mark.parametrize(("device", "name", "mode", "dtype", "metric"), ON_PRESENT)
def test_search_on_an_accelerator(device, name, mode, dtype, metric):
    case = problem(name)
    index, _, queries = shared(case, metric, dtype, search_mode=mode)
    moved = deepcopy(index).to(device)
    D, I = moved.search(queries.to(device), case.k)
    assert D.device.type == I.device.type == device
    check((D.cpu(), I.cpu()), queries, stored_rows(index), metric, case.k, probed(index, queries))
    lims, _, _ = moved.range_search(queries.to(device), 3.0)
    assert lims.device.type == device


@pytest.mark.parametrize(("device", "metric"), list(itertools.product(PRESENT, METRICS)))
def test_building_on_an_accelerator(device, metric):
    index = IndexIVFFlat(16, nlist=4, nprobe=4, metric=metric, device=device)
    base, queries = normal(200, 16), normal(9, 16, seed=1)
    index.train(base.to(device))
    index.add(base.to(device))
    index.remove_ids(torch.arange(10, device=device))
    index.update(torch.arange(20, 25, device=device), base[:5].to(device))
    D, I = index.search(queries.to(device), 5)
    check((D, I), queries, stored_rows(index), metric, 5)
    assert index.reconstruct(30).device.type == device
    agree((D.cpu(), I.cpu()), deepcopy(index).to("cpu").search(queries, 5), rtol=1e-4, atol=1e-5)


WITHOUT_WAITING = [("matrix", metric) for metric in METRICS] + [("triton", "ip"), ("triton", "cosine")]
needs_cuda = pytest.mark.skipif("cuda" not in PRESENT, reason="no GPU that torch.cuda knows")


def on_cuda(mode, metric, monkeypatch):
    """An index and queries on the GPU, searched once, and the answer."""
    (scan,) = (scan for scan in SCANS if scan.name == "triton")
    monkeypatch.setattr(scan, "enabled", mode == "triton")
    index, _, queries = shared(CASE, metric, search_mode="auto" if mode == "triton" else mode)
    index, queries = deepcopy(index).to("cuda"), queries.to("cuda")
    return index, queries, index.search(queries, CASE.k)


@needs_cuda
@pytest.mark.parametrize(("mode", "metric"), WITHOUT_WAITING)
def test_a_search_on_a_gpu_does_not_wait(monkeypatch, mode, metric):
    index, queries, expected = on_cuda(mode, metric, monkeypatch)
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        found = index.search(queries, CASE.k)
    finally:
        torch.cuda.set_sync_debug_mode(before)
    agree(tuple(part.cpu() for part in found), tuple(part.cpu() for part in expected))


@needs_cuda
@pytest.mark.parametrize(("mode", "metric"), WITHOUT_WAITING)
def test_a_cuda_graph_of_a_search(monkeypatch, mode, metric):
    index, queries, _ = on_cuda(mode, metric, monkeypatch)
    graph, x = torch.cuda.CUDAGraph(), queries.flip(0).clone()
    with torch.cuda.graph(graph):
        found = index.search(x, CASE.k)
    x.copy_(queries)
    graph.replay()
    expected = index.search(queries, CASE.k)
    agree(tuple(part.cpu() for part in found), tuple(part.cpu() for part in expected))


# --- fake tensors -------------------------------------------------------------------------------------------


# A build of torch without CUDA cannot slice a fake cuda tensor; "lazy" is a device type that every
# build knows and none needs hardware for.
FAKE = "cuda" if torch.backends.cuda.is_built() else "lazy"


def on_fake_device(index, mode):
    """A copy of `index` whose buffers are fake tensors on another device."""
    index = deepcopy(index)

    def fake(tensor):
        return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=FAKE)

    with mode:
        return index._apply(fake)


def _static_search(x, coarse, lists, metric, max_codes):
    """The steps of a graph: no number is read back from the device."""
    queries, finite = finite_queries(x)
    nearest = probe_by_ranking(queries, coarse, 3, metric)
    probed, _ = capped_lists(nearest, finite, coarse, [lists], max_codes)
    rows = scan_queries(shifted_queries(queries, coarse.origin, metric), lists, probed, None, 13, 128, 1 << 28)[1]
    return rescore(queries, lists.packed, rows, 4, metric)


@each_dtype
@each_metric
@pytest.mark.parametrize("kind", ["ivf", "flat"])
@pytest.mark.parametrize("max_codes", [None, 50])
def test_query_major_search_on_fake_tensors(metric, dtype, kind, max_codes):
    if kind == "flat" and metric == "cosine":
        return
    index, _, queries = (shared if kind == "ivf" else flat)(CASE, metric, dtype)
    mode = FakeTensorMode()
    index = on_fake_device(index, mode)
    with mode:
        coarse, segments = index.store.segments()
        x = torch.empty(queries.shape, device=FAKE)
        scores, rows = _static_search(x, coarse, segments[0], metric, max_codes)
        ids = ids_at([segments[0].ids], rows)
    for tensor in (scores, rows, ids, *coarse[:4], *segments[0]):
        assert tensor.device.type == FAKE
    assert scores.shape == ids.shape == (len(queries), 4)


def test_fake_tensors_detect_a_tensor_on_the_wrong_device():
    index, _, queries = shared(CASE)
    mode = FakeTensorMode()
    index = on_fake_device(index, mode)
    with mode:
        coarse, segments = index.store.segments()
        stray = segments[0]._replace(bias=torch.empty(segments[0].bias.shape))
        x = torch.empty(queries.shape, device=FAKE)
        with pytest.raises(RuntimeError, match=r"(?i)device"):
            _static_search(x, coarse, stray, "l2", None)


# --- a simulated device -----------------------------------------------------------------------------------

def test_the_simulated_device_detects_a_tensor_on_the_wrong_device(other_device):
    x = away(torch.ones(3))
    assert x.device == AWAY
    assert (x + 1).device == AWAY
    assert x.sum().item() == 3.0
    assert x.tolist() == [1.0, 1.0, 1.0]
    assert torch.zeros(2, device=x.device).device == AWAY
    assert torch.zeros(2).device.type == "cpu"
    with pytest.raises(RuntimeError, match="wrong device"):
        x + torch.ones(3)
    with pytest.raises(RuntimeError, match="wrong device"):
        x[torch.arange(2)]


@each_mode
@each_dtype
@each_metric
@pytest.mark.parametrize("max_codes", [None, 40])
def test_search_on_a_simulated_device(other_device, mode, dtype, metric, max_codes):
    index, base, queries = shared(CASE, metric, dtype, search_mode=mode)
    index.max_codes = max_codes
    expected = index.search(queries, CASE.k)
    index = moved(index)
    assert index.device == AWAY
    D, I = index.search(away(queries), CASE.k)
    agree((back(D), back(I)), expected, rtol=1e-5, atol=1e-5)
    index.add(away(base[:4]))
    D, I = index.search(away(queries), CASE.k)
    assert back(D).shape == (len(queries), CASE.k)


@each_metric
def test_range_search_on_a_simulated_device(other_device, metric):
    index, _, queries = shared(CASE, metric)
    expected = index.range_search(queries, 0.5)
    found = moved(index).range_search(away(queries), 0.5)
    assert torch.equal(back(found[0]), expected[0])
    assert back(found[1]).shape == back(found[2]).shape == expected[1].shape


@each_metric
def test_building_on_a_simulated_device(other_device, metric):
    def build(place):
        index = IndexIVFFlat(8, nlist=4, nprobe=4, metric=metric, device=place(torch.ones(1)).device)
        base = normal(200, 8)
        index.train(place(base))
        index.add(place(base))
        index.add_with_ids(place(base[:3]), place(torch.tensor([900, 901, 902])))
        index.remove_ids(place(torch.arange(10)))
        index.remove_ids(place(torch.arange(300) % 7 == 1))
        index.update(place(torch.tensor([20, 30])), place(base[:2]))
        index.add_with_ids(place(base[:2]), place(torch.tensor([40, 41])))
        index.merge_from(index.copy_subset(place(torch.arange(50, 60))), 1000)
        index.retrain(niter=1)
        return index

    index, reference = build(away), build(lambda tensor: tensor)
    assert settings_of(index) == settings_of(reference)
    for name, value in reference.state_dict().items():
        torch.testing.assert_close(back(index.state_dict()[name]), value)
    assert torch.equal(back(index.reconstruct(40)), reference.reconstruct(40))
    assert torch.equal(back(index.reconstruct_n(37, 3)), reference.reconstruct_n(37, 3))
    assert index.list_stats() == reference.list_stats()
    index.remove_ids(away(torch.tensor([37])))
    found = index.search_and_reconstruct(away(normal(3, 8, seed=1)), 4)
    assert [back(part).shape for part in found] == [(3, 4), (3, 4), (3, 4, 8)]
    index.reset()
    assert index.ntotal == 0


def test_a_tensor_on_another_device_is_refused(other_device):
    index, _, queries = shared(CASE)
    index = moved(index)
    for call in (
        lambda: index.search(queries, 3),
        lambda: index.range_search(queries, 3.0),
        lambda: index.add(queries),
        lambda: index.train(queries),
        lambda: index(queries),
    ):
        with pytest.raises((ValueError, RuntimeError), match=r"(?s)x .*cpu.*lazy"):
            call()


@each_metric
def test_kmeans_on_a_simulated_device(other_device, metric):
    x = normal(200, 8)
    centroids, objective = kmeans(away(x), 5, metric=metric)
    expected = kmeans(x, 5, metric=metric)
    torch.testing.assert_close(back(centroids), expected[0])
    torch.testing.assert_close(back(objective), expected[1])
