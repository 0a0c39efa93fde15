"""Answers do not depend on torch's default device and default dtype."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from tests.datasets import normal
from torch_ivf_module import (
    IndexFlat,
    IndexFlatL2,
    IndexIVFFlat,
    IndexPreTransform,
    SearchParams,
    export,
    from_faiss,
    load,
    native,
    to_faiss,
    tune,
)
from torch_ivf_module.cli import main
from torch_ivf_module.functional import kmeans

D = 8
X, QUERIES = normal(400, D, seed=1), normal(9, D, seed=2)
ON = {"device": "cpu", "dtype": torch.float32}


@contextmanager
def meta() -> Iterator[None]:
    """Tensors that are created without a device have no values."""
    torch.set_default_device("meta")
    try:
        yield
    finally:
        torch.set_default_device(None)


@contextmanager
def inside_meta() -> Iterator[None]:
    with torch.device("meta"):
        yield


@contextmanager
def double() -> Iterator[None]:
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


DEFAULTS = {"default device": meta, "a device's context": inside_meta, "default dtype": double}


def built(metric: str) -> IndexIVFFlat:
    index = IndexIVFFlat(D, nlist=8, nprobe=3, metric=metric, **ON)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # few training rows
        index.train(X).add(X[:300])
    return index


def searches(index: Any) -> Iterator[Any]:
    yield index.search(QUERIES, 5)
    yield index.search(QUERIES[:0], 5)
    yield index.search(QUERIES[:1], 1)
    selected = (X[:, 0] > 0).to("cpu"), index.list_ids[::3]
    for selector in selected:
        yield index.search(QUERIES, 5, params=SearchParams(selector=selector))
    radius = float(X.square().sum(1).mean()) / 2
    yield index.range_search(QUERIES, radius)


def ivf_searches(metric: str) -> Iterator[Any]:
    index = built(metric)
    for mode in ("csr", "matrix", "auto"):
        index.search_mode = mode
        yield from searches(index)
        for profile in ("exact", "speed", "approx", "approx_quality"):
            yield index.search(QUERIES, 5, params=SearchParams(profile=profile, nprobe=4))
        yield index.search(QUERIES, 5, params=SearchParams(max_codes=60))
    yield index.search(QUERIES.double(), 5)
    yield index.search(QUERIES.half(), 5)


def gradients() -> Iterator[Any]:
    for index in (built("l2"), flat("cosine")):
        x = QUERIES.clone().requires_grad_()
        yield torch.autograd.grad(index.search(x, 4)[0].sum(), x)


def flat(metric: str) -> IndexFlat:
    index = IndexFlat(D, metric, **ON)
    index.add(X)
    return index


def flat_searches(metric: str) -> Iterator[Any]:
    index = flat(metric)
    for mode in ("auto", "matrix"):
        index.search_mode = mode
        yield from searches(index)


def mutations() -> Iterator[Any]:
    for index in (built("l2"), flat("ip")):
        index.add(X[300:])
        index.add_with_ids(X[:4], index.list_ids[:4] + 10_000)
        yield index.search(QUERIES, 5)
        yield index.remove_ids(index.list_ids[:20])
        mask = index.list_ids.new_zeros(30, dtype=torch.bool)
        mask[7] = True
        yield index.remove_ids(mask)
        ids = index.list_ids[:6].clone()
        index.update(ids, X[:6] + 1)
        yield index.search(QUERIES, 5)
        yield index.reconstruct(int(ids[0])), index.reconstruct_batch(ids), index.search_and_reconstruct(QUERIES, 3)
        part = index.copy_subset(ids)
        yield part.search(QUERIES, 3)
        index.merge_from(part)
        index.half()
        index.add(X[:5])
        yield index.search(QUERIES, 5)
        yield list(index.state_dict().values())
        index.reset()
        yield index.search(QUERIES, 2)
    index = built("l2")
    index.add(X)
    index.retrain()
    yield index.search(QUERIES, 5), index.list_stats()


def files(folder: Path) -> Iterator[Any]:
    index = built("cosine")
    layer = nn.Linear(D, 3, **ON).requires_grad_(False)
    layer.weight.copy_(X[:3])
    layer.bias.zero_()
    behind = IndexPreTransform(D, layer, IndexFlatL2(3, **ON))
    behind.add(X)
    for made in (index, behind):
        for suffix in (".pt", ".safetensors"):
            made.save(folder / f"index{suffix}")
            for mmap in (False, True):
                loaded = load(folder / f"index{suffix}", mmap=mmap)
                yield loaded.search(QUERIES, 5)
    empty = IndexIVFFlat(D, nlist=8, nprobe=3, metric="cosine", **ON)
    empty.load_state_dict(index.state_dict())
    yield empty.search(QUERIES, 5)
    index.save_pretrained(folder / "hub")
    yield IndexIVFFlat.from_pretrained(folder / "hub").search(QUERIES, 5)


def faiss_and_back(faiss: Any) -> Iterator[Any]:
    for factory in ("Flat", "IVF8,Flat", "SQ8", "IVF8,SQfp16", "PCA4,IVF4,Flat", "L2norm,Flat", "IDMap,Flat"):
        theirs = faiss.index_factory(D, factory)
        theirs.train(X.numpy())
        if factory.startswith("IDMap"):
            theirs.add_with_ids(X.numpy(), np.arange(400) * 3)
        else:
            theirs.add(X.numpy())
        ours = from_faiss(theirs)
        yield ours.search(QUERIES, 5)
        yield torch.from_numpy(to_faiss(ours).search(QUERIES.numpy(), 5)[1])


def graphs() -> Iterator[Any]:
    for index in (built("l2"), flat("ip")):
        for layout in ("rows", "tiles"):
            graph = index.graph(k=4, layout=layout)
            yield graph(QUERIES)
            yield graph(QUERIES, torch.ones_like(X[:, 0], dtype=torch.bool))
        yield index.graph(k=4, storage=torch.float16)(QUERIES)


def fits() -> Iterator[Any]:
    yield kmeans(X, 8, niter=3, metric="l2")
    yield kmeans(X, 8, niter=3, metric="cosine", max_points_per_centroid=20)
    tuned = tune(built("l2"), X[:64], target_recall=0.9, k=5, budget=None)
    yield tuned.nprobe, tuned.recall


def commands(folder: Path) -> Iterator[Any]:
    np.save(folder / "x.npy", X.numpy())
    words = ["build", folder / "x.npy", folder / "built.pt", "--nlist", 8, "--train-rows", 350, "--seed", 3]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert main([str(word) for word in [*words, "--device", "cpu"]]) == 0
    yield list(load(folder / "built.pt").state_dict().values())
    found = [folder / "I.npy", folder / "D.npy"]
    words = ["search", folder / "built.pt", folder / "x.npy", "--ids", found[0], "--distances", found[1]]
    assert main([str(word) for word in words]) == 0
    yield [torch.from_numpy(np.load(path)) for path in found]
    assert main(["export", str(folder / "built.pt"), "--format", "torchscript", "--check"]) == 0
    assert main(["info", str(folder / "built.pt")]) == 0


FLOWS = {
    "ivf, l2": lambda folder, faiss: ivf_searches("l2"),
    "ivf, ip": lambda folder, faiss: ivf_searches("ip"),
    "ivf, cosine": lambda folder, faiss: ivf_searches("cosine"),
    "flat, l2": lambda folder, faiss: flat_searches("l2"),
    "flat, cosine": lambda folder, faiss: flat_searches("cosine"),
    "gradients": lambda folder, faiss: gradients(),
    "mutations": lambda folder, faiss: mutations(),
    "files": lambda folder, faiss: files(folder),
    "faiss": lambda folder, faiss: faiss_and_back(faiss),
    "graphs": lambda folder, faiss: graphs(),
    "fits": lambda folder, faiss: fits(),
    "commands": lambda folder, faiss: commands(folder),
}


def same(found: Any, expected: Any) -> None:
    if isinstance(expected, Tensor):
        assert found.dtype == expected.dtype
        torch.testing.assert_close(found, expected, rtol=0, atol=0, equal_nan=True)
    elif isinstance(expected, (tuple, list)):
        for one, other in zip(found, expected, strict=True):
            same(one, other)
    else:
        assert found == expected


@pytest.mark.parametrize("flow", FLOWS)
def test_answers_do_not_depend_on_the_defaults(flow, faiss, tmp_path):
    check_flow(flow, faiss, tmp_path)


@pytest.mark.parametrize("flow", [flow for flow in FLOWS if "," in flow])
def test_answers_of_the_kernel_do_not_depend_on_the_defaults(flow, faiss, tmp_path, monkeypatch):
    monkeypatch.setattr(native.library._library, "switched_off", False)
    if not native.available():
        pytest.skip("there is no kernel here")
    check_flow(flow, faiss, tmp_path)


def check_flow(flow, faiss, tmp_path):
    expected = list(FLOWS[flow](tmp_path, faiss))
    assert expected
    for default in DEFAULTS.values():
        with default():
            found = list(FLOWS[flow](tmp_path, faiss))
        same(found, expected)


def test_an_export_is_opened_on_the_cpu(tmp_path):
    graph = built("l2").graph(k=4)
    with meta():
        path = export.to_exported(graph, tmp_path / "graph.pt2")
        found = export.runner(path, "exported")(QUERIES)
    same(list(found), list(graph(QUERIES)))
