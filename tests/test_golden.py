"""Files of released formats, of this project, faiss and torch-ivf, open with the answers that are stored with them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from torch import nn

from tests.oracle import agree
from tests.problems import defaults
from torch_ivf_module import IndexIVFFlat, load
from torch_ivf_module.checkpoint import VERSION

HERE = Path(__file__).parent / "golden"
KINDS = (".pt", ".safetensors", ".faiss")
FILES = sorted(path for path in HERE.glob("*/*") if path.suffix in KINDS and "state_dict" not in path.name)


def expected(path: Path):
    """The queries of a folder, and the answers to them of one index in it."""
    content = json.loads((path.parent / "expected.json").read_text())
    answer = content["answers"].get(path.stem)
    if answer is not None:
        answer = torch.tensor(answer["D"], dtype=torch.float32), torch.tensor(answer["I"])
    return torch.tensor(content["queries"]), content["k"], answer


@pytest.mark.parametrize("mmap", [False, True])
@pytest.mark.parametrize("path", FILES, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_old_files_open_with_the_same_answers(path, mmap, request):
    if path.suffix == ".faiss":
        request.getfixturevalue("faiss")
    index = load(path, mmap=mmap)
    queries, k, answer = expected(path)
    if answer is None:
        assert (index.ntotal, index.is_trained) == (0, False)
        return
    # torch-ivf computes the distances of float16 vectors in float16.
    rough = path.stem == "float16"
    agree(index.search(queries, k), answer, rtol=2e-2 if rough else 1e-4, atol=2e-2 if rough else 1e-5)


@pytest.mark.parametrize("settings", [{"device": "meta"}, {"dtype": torch.float64}], ids=["meta", "float64"])
@pytest.mark.parametrize("path", FILES, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_the_default_device_and_dtype_have_no_effect(path, settings, request):
    if path.suffix == ".faiss":
        request.getfixturevalue("faiss")
    expected = load(path).state_dict()
    with defaults(**settings):
        found = load(path).state_dict()
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor)
        assert found[name].dtype == tensor.dtype


def test_every_version_has_golden_files():
    for kind in ("v", "codes-v"):
        assert [f"{kind}{number}" for number in range(1, VERSION + 1)] == sorted(p.name for p in HERE.glob(f"{kind}*"))


def test_an_old_model_loads_into_a_new_one():
    model = nn.Sequential(nn.Linear(6, 6), IndexIVFFlat(6, nlist=5, nprobe=3))
    model.load_state_dict(torch.load(HERE / "v1" / "model.state_dict.pt", weights_only=True))
    queries, k, answer = expected(HERE / "v1" / "ivf.pt")
    model[1].max_codes = 50
    agree(model[1].search(queries, k), answer, rtol=1e-5, atol=1e-5)


def test_the_classmethod_of_torch_ivf_opens_its_files():
    index = IndexIVFFlat.load(HERE / "torch-ivf-0.1.1" / "l2.pt", map_location="cpu")
    assert (index.nlist, index.nprobe, index.max_codes, int(index.next_id)) == (4, 4, None, 60)
    with pytest.raises(TypeError, match="IndexFlatL2"):
        IndexIVFFlat.load(HERE / "v1" / "flat.pt")


def test_an_altered_torch_ivf_file_is_refused(tmp_path):
    content = torch.load(HERE / "torch-ivf-0.1.1" / "l2.pt", weights_only=True)
    for name, wrong in {
        "list_offsets": content["list_offsets"].flip(0),
        "list_ids": content["list_ids"][:-1],
        "packed_embeddings": content["packed_embeddings"].numpy().tolist(),
        "metric": "manhattan",
        "nlist": -3,
        "d": 5,
    }.items():
        torch.save({**content, name: wrong}, tmp_path / "index.pt")
        with pytest.raises(ValueError, match=r"index\.pt"):
            load(tmp_path / "index.pt")


def test_files_of_the_installed_torch_ivf(tmp_path):
    """Files written during the test, if torch-ivf is installed."""
    theirs = pytest.importorskip("torch_ivf.index")
    x = torch.randn(500, 8, generator=torch.Generator().manual_seed(0))
    index = theirs.IndexIVFFlat(8, nlist=8, nprobe=3)
    index.train(x, generator=torch.Generator().manual_seed(1))
    index.add(x)
    index.save(str(tmp_path / "index.pt"))
    agree(load(tmp_path / "index.pt").search(x[:20], 5), index.search(x[:20], 5), rtol=1e-4, atol=1e-5)


def test_golden_files_are_not_opened_for_writing(tmp_path):
    """Changes of a mapped index do not change its file."""
    copy = Path(shutil.copy(HERE / "v1" / "ivf.pt", tmp_path))
    index = load(copy, mmap=True)
    index.remove_ids(index.list_ids[:10])
    index.packed_embeddings.zero_()
    assert copy.read_bytes() == (HERE / "v1" / "ivf.pt").read_bytes()
