"""Saving to and loading from folders in the format of the Hugging Face Hub, without a network."""

from __future__ import annotations

import json
import os

import pytest
import torch
from torch import nn

from tests.datasets import normal
from tests.problems import few_training_rows
from tests.states import same_state, settings_of, snapshot
from torch_ivf_module import IndexFlatIP, IndexFlatL2, IndexIVFFlat, IndexPreTransform, load

pytest.importorskip("huggingface_hub")
D = 6


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


def ivf() -> IndexIVFFlat:
    index = IndexIVFFlat(D, nlist=4, nprobe=3, k=7, metric="cosine", dtype=torch.float16)
    with few_training_rows():
        index.train(normal(80, D)).add(normal(80, D))
    return index


def flat() -> IndexFlatIP:
    index = IndexFlatIP(D)
    index.add_with_ids(normal(20, D), torch.arange(20) + 2**40)
    return index


def behind() -> IndexPreTransform:
    index = IndexPreTransform(D, nn.Linear(D, 3).requires_grad_(False), IndexFlatL2(3))
    index.add(normal(20, D))
    return index


@pytest.mark.parametrize("make", [ivf, flat, behind, lambda: IndexIVFFlat(D, nlist=3)])
def test_round_trip(make, tmp_path):
    index = make()
    index.save_pretrained(tmp_path)
    loaded = type(index).from_pretrained(tmp_path)
    assert same_state(snapshot(loaded), snapshot(index))
    assert type(loaded) is type(index)
    if not isinstance(index, IndexPreTransform):
        assert settings_of(loaded) == settings_of(index)
    assert same_state(snapshot(load(tmp_path / "model.safetensors")), snapshot(index)), "also a file that load opens"
    assert {file.name for file in tmp_path.iterdir()} == {"config.json", "model.safetensors", "README.md"}


def test_the_configuration_can_be_read_and_set_by_hand(tmp_path):
    ivf().save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["class"] == "IndexIVFFlat"
    assert (config["config"]["nlist"], config["config"]["metric"]) == (4, "cosine")
    config["config"].update(nprobe=1, k=2)
    (tmp_path / "config.json").write_text(json.dumps(config))
    loaded = IndexIVFFlat.from_pretrained(tmp_path, mmap=True)
    assert (loaded.nprobe, loaded.k) == (1, 2)


def test_auto_rebalance_may_be_set_in_the_configuration(tmp_path):
    ivf().save_pretrained(tmp_path)
    assert IndexIVFFlat.from_pretrained(tmp_path).auto_rebalance is None
    _config(tmp_path, auto_rebalance=1.5)
    assert IndexIVFFlat.from_pretrained(tmp_path).auto_rebalance == 1.5


def _config(tmp_path, **wrong):
    config = json.loads((tmp_path / "config.json").read_text())
    config["config"].update(wrong)
    (tmp_path / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize(
    "wrong", [{"nlist": 5}, {"d": 7}, {"metric": "l2"}, {"dtype": "float32"}, {"nprobe": -1}, {"nprobe": "3"}]
)
def test_a_configuration_that_contradicts_the_buffers_is_refused(wrong, tmp_path):
    ivf().save_pretrained(tmp_path)
    _config(tmp_path, **wrong)
    with pytest.raises(ValueError, match=next(iter(wrong))):
        IndexIVFFlat.from_pretrained(tmp_path)


def test_settings_of_an_index_behind_a_transform(tmp_path):
    behind().save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["config"]["index"]["config"]["k"] = 3
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert IndexPreTransform.from_pretrained(tmp_path).index.k == 3
    for wrong in (None, [1], "words"):
        (tmp_path / "config.json").write_text(json.dumps({**config, "config": wrong}))
        with pytest.raises(ValueError, match=r"config\.json"):
            IndexPreTransform.from_pretrained(tmp_path)


CONFIGS = {
    "config of another": b'{"class": "IndexFlatL2"}',
    "cut config": b'{"class": "IndexIVF',
    "config that is a list": b"[1, 2]",
    "config that is no text": b"\xff\xfe",
    "empty config": b"",
}


@pytest.mark.parametrize("damage", [*CONFIGS, "no config", "no weights", "cut weights", "foreign weights"])
def test_missing_and_damaged_files_are_refused(damage, tmp_path):
    """The mixin of huggingface_hub alone would load them with strict=False."""
    ivf().save_pretrained(tmp_path)
    weights = tmp_path / "model.safetensors"
    if damage == "no config":
        os.remove(tmp_path / "config.json")
    elif damage == "no weights":
        os.remove(weights)
    elif damage in CONFIGS:
        (tmp_path / "config.json").write_bytes(CONFIGS[damage])
    elif damage == "cut weights":
        weights.write_bytes(weights.read_bytes()[:-5])
    else:
        pytest.importorskip("safetensors.torch").save_file({"centroids": torch.ones(2, D)}, weights)
    with pytest.raises((ValueError, FileNotFoundError), match=r"config\.json|model\.safetensors"):
        IndexIVFFlat.from_pretrained(tmp_path)


def test_an_index_of_another_class_is_refused(tmp_path):
    flat().save_pretrained(tmp_path)
    with pytest.raises(TypeError, match="IndexFlatIP"):
        IndexIVFFlat.from_pretrained(tmp_path)
