"""Programs written for torch-ivf 0.1.1: every public name works, or docs/from-torch-ivf.md says why not."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from tests.datasets import normal
from tests.problems import few_training_rows, flat
from torch_ivf_module.index import IndexBase, IndexFlatIP, IndexFlatL2, IndexIVFFlat, SearchParams

PAGE = (Path(__file__).parent.parent / "docs" / "from-torch-ivf.md").read_text(encoding="utf-8")
# All public names of the classes of torch-ivf.
EVERY = [
    "d",
    "metric",
    "dtype",
    "device",
    "ntotal",
    "is_trained",
    "to",
    "cpu",
    "cuda",
    "rocm",
    "dml",
    "train",
    "add",
    "add_with_ids",
    "search",
    "range_search",
    "reset",
]
FLAT = ["search_mode", "auto_matrix_bytes_threshold"]
IVF = [
    "nlist",
    "nprobe",
    "max_codes",
    "search_mode",
    "auto_search_avg_group_threshold",
    "csr_small_batch_avg_group_threshold",
    "approximate_mode",
    "rebuild_lists",
    "last_search_stats",
    "state_dict",
    "load_state_dict",
    "save",
    "load",
]
NAMES = {IndexFlatL2: EVERY + FLAT, IndexFlatIP: EVERY + FLAT, IndexIVFFlat: EVERY + IVF}


@pytest.mark.parametrize(("kind", "name"), [(kind, name) for kind, names in NAMES.items() for name in names])
def test_every_public_name_exists_and_is_documented(kind, name):
    assert hasattr(kind(4), name)
    assert re.search(rf"`{name}\b", PAGE)


def test_constructor_arguments():
    index = IndexIVFFlat(d=8, metric="ip", nlist=16, nprobe=None, device="cpu", dtype=torch.float16)
    assert (index.d, index.metric, index.nlist, index.nprobe, index.dtype) == (8, "ip", 16, 8, torch.float16)
    for kind in (IndexFlatL2, IndexFlatIP):
        assert isinstance(kind(8, device=None, dtype=torch.float32), IndexBase)


def test_settings_of_torch_ivf():
    index = IndexIVFFlat(8)
    assert index.auto_search_avg_group_threshold == 8.0
    assert index.csr_small_batch_avg_group_threshold == 64.0
    assert index.approximate_mode is False
    index.auto_search_avg_group_threshold = 6.0
    index.approximate_mode = True
    assert (index.auto_search_avg_group_threshold, index.approximate_mode) == (6.0, True)
    assert IndexIVFFlat(8).auto_search_avg_group_threshold == 8.0


def test_flat_modes():
    index, _, queries = flat()
    expected = index.search(queries, 5)[1]
    for mode in ("matrix", "chunked", "auto"):
        index.search_mode = mode
        assert torch.equal(index.search(queries, 5)[1], expected)
    with pytest.raises(ValueError, match="search_mode"):
        index.search_mode = "chunky"
    index.auto_matrix_bytes_threshold = 1 << 20
    assert index.max_bytes == index.auto_matrix_bytes_threshold == 1 << 20
    with pytest.raises(ValueError, match="max_bytes"):
        index.auto_matrix_bytes_threshold = 0


def test_training_arguments():
    x = normal(400, 8)
    one, two = IndexIVFFlat(8, nlist=4), IndexIVFFlat(8, nlist=4)
    generator = torch.Generator().manual_seed(3)
    with few_training_rows():
        one.train(x, max_iter=2, batch_size=64, tol=1e-3, generator=generator, verbose=False)
        two.train(x, niter=2, generator=torch.Generator().manual_seed(3))
    assert torch.equal(one.centroids, two.centroids)
    assert one.eval().training is False
    with pytest.raises(TypeError, match="max_iters"):
        one.train(x, max_iters=2)


def test_devices():
    index = IndexFlatL2(4)
    assert index.cpu() is index
    assert index.to("cpu") is index
    with pytest.raises(RuntimeError, match="dml"):
        index.dml()
    assert index.dml("cpu") is index
    if torch.version.hip is None:
        with pytest.raises(RuntimeError, match="ROCm"):
            index.rocm()


def test_keywords_of_a_search():
    index, _, queries = flat()
    found = index.search(queries, k=3, params=SearchParams(nprobe=2))
    assert torch.equal(found[1], index.search(queries, 3)[1])
