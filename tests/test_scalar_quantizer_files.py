"""Files, checkpoints and processes of indexes of codes."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import nn

from tests import jobs_codes, processes
from tests.datasets import PLAIN, normal
from tests.kinds import same_answers
from tests.problems import each_bits, few_training_rows, flat_codes, shared
from tests.states import same_state, snapshot, unchanged
from torch_ivf_module import AveragedModel, IndexScalarQuantizer, load
from torch_ivf_module.checkpoint import BadFile
from torch_ivf_module.cli import main
from torch_ivf_module.dcp import IndexLoadPlanner

each_index = pytest.mark.parametrize("make", [shared, flat_codes], ids=["ivf", "flat"])


@each_bits
@each_index
@pytest.mark.parametrize("mmap", [False, True])
@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_own_files(suffix, mmap, make, bits, tmp_path):
    index, base, queries = make(PLAIN, "ip", bits=bits)
    index.save(tmp_path / f"index{suffix}")
    again = load(tmp_path / f"index{suffix}", mmap=mmap)
    assert type(again) is type(index)
    assert again.config() == index.config()
    assert same_state(snapshot(again), snapshot(index))
    same_answers(again, index, queries)
    again.add(base[:3])
    assert again.ntotal == index.ntotal + 3
    with pytest.raises(TypeError, match="holds an Index"):
        (type(flat_codes().index) if make is shared else type(shared().index)).load(tmp_path / f"index{suffix}")


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_damaged_codes_are_refused(suffix, tmp_path):
    index = shared(PLAIN, bits=8).index
    path = tmp_path / f"index{suffix}"
    index.save(path)
    content = bytearray(path.read_bytes())
    at = content.find(index.packed_codes[100].numpy().tobytes())
    assert at > 0
    content[at] ^= 1
    path.write_bytes(content)
    with pytest.raises(BadFile, match="packed_codes does not match its checksum"):
        load(path)
    assert load(path, mmap=True).ntotal == index.ntotal


@each_bits
@each_index
def test_hub(make, bits, tmp_path):
    pytest.importorskip("huggingface_hub")
    index, _, queries = make(PLAIN, bits=bits)
    index.save_pretrained(tmp_path / "folder")
    assert json.loads((tmp_path / "folder" / "config.json").read_text())["config"]["bits"] == bits
    same_answers(type(index).from_pretrained(tmp_path / "folder"), index, queries)
    config = json.loads((tmp_path / "folder" / "config.json").read_text())
    config["config"]["bits"] = 12 - bits
    (tmp_path / "folder" / "config.json").write_text(json.dumps(config))
    with pytest.raises(BadFile, match="bits"):
        type(index).from_pretrained(tmp_path / "folder")


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
@each_bits
@each_index
def test_distributed_checkpoint(make, bits, tmp_path):
    index, _, queries = make(PLAIN, bits=bits)
    model = nn.Sequential(nn.Linear(4, PLAIN.d), index)
    dcp.save({"model": model}, checkpoint_id=tmp_path / "checkpoint", no_dist=True)
    fresh = type(index)(**index.config())
    twin = nn.Sequential(nn.Linear(4, PLAIN.d), fresh)
    dcp.load({"model": twin}, checkpoint_id=tmp_path / "checkpoint", planner=IndexLoadPlanner(), no_dist=True)
    same_answers(fresh, index, queries)


@each_bits
def test_states_in_torch_files(bits, tmp_path):
    index, _, queries = shared(PLAIN, bits=bits)
    torch.save(index.state_dict(), tmp_path / "state.pt")
    with torch.device("meta"):
        fresh = type(index)(**index.config())
    fresh.load_state_dict(torch.load(tmp_path / "state.pt", mmap=True, weights_only=True), assign=True)
    same_answers(fresh, index, queries)


def test_averages_follow_the_codes():
    index, base, _ = shared(PLAIN, bits=8)
    model = nn.Sequential(nn.Linear(4, PLAIN.d), index)
    average = AveragedModel(model, use_buffers=True)
    index.add(base[:7])
    average.update_parameters(model)
    average.update_parameters(model)
    assert same_state(snapshot(average.module[1]), snapshot(index))


@pytest.mark.parametrize("shard", ["rows", "lists"])
@pytest.mark.parametrize("size", [1, 3])
def test_shards(size, shard, tmp_path):
    assert processes.run(jobs_codes.sharded, size, shard, str(tmp_path)) == [0] * size


# --- the command line -------------------------------------------------------------------------------------------


def run(*words) -> int:
    return main([str(word) for word in words])


@pytest.fixture
def vectors(tmp_path):
    np.save(tmp_path / "x.npy", normal(800, 16).numpy())
    return tmp_path / "x.npy"


@each_bits
@pytest.mark.parametrize("flat", [False, True])
def test_build_and_info(flat, bits, vectors, tmp_path, capsys):
    words = ("build", vectors, tmp_path / "index.pt", "--bits", bits, "--metric", "ip", "--json")
    assert run(*words, *(["--flat"] if flat else ["--nlist", 8])) == 0
    facts = json.loads(capsys.readouterr().out)
    index = load(tmp_path / "index.pt")
    assert facts["class"] == type(index).__name__ == ("IndexScalarQuantizer" if flat else "IndexIVFScalarQuantizer")
    assert (index.ntotal, index.metric, index.config()["bits"], facts["bits"]) == (800, "ip", bits, bits)
    expected = IndexScalarQuantizer(16, bits, "ip")
    expected.add(normal(800, 16))
    assert torch.equal(index.packed_codes[index.list_ids.argsort()], expected.packed_codes)
    assert run("info", tmp_path / "index.pt", "--json") == 0
    assert json.loads(capsys.readouterr().out)["bytes_per_vector"]["row"] == 16 * bits // 8 + 8
    assert run("info", tmp_path / "index.pt") == 0
    told = capsys.readouterr().out
    assert f"800 of 16, codes of {bits} bits;" in told
    assert f"a vector {16 * bits // 8 + 8} bytes, its id 8\n" in told
    assert run("search", tmp_path / "index.pt", vectors, "-k", 3, "--json") == 0
    assert json.loads(capsys.readouterr().out)["queries"] == 800


def test_info_of_floats_has_bytes_per_vector(vectors, tmp_path, capsys):
    assert run("build", vectors, tmp_path / "index.pt", "--flat", "--dtype", "float16") == 0
    assert run("info", tmp_path / "index.pt") == 0
    assert "a vector 32 bytes, its id 8; its 8-bit copy" in capsys.readouterr().out


def test_flags_that_do_not_go_together(vectors, tmp_path, capsys):
    assert run("build", vectors, tmp_path / "index.pt", "--flat", "--bits", 8, "--dtype", "float16") == 1
    assert "leave one of them out" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        run("build", vectors, tmp_path / "index.pt", "--bits", 5)
    assert run("build", vectors, tmp_path / "index.pt", "--flat", "--bits", 4) == 0
    assert run("convert", tmp_path / "index.pt", tmp_path / "other.safetensors") == 0
    assert load(tmp_path / "other.safetensors").config()["bits"] == 4
    assert run("convert", tmp_path / "index.pt", tmp_path / "other.pt", "--dtype", "float16") == 1
    assert "contains codes of 4 bits" in capsys.readouterr().err


def test_loading_a_state_is_all_or_nothing():
    index = shared(PLAIN, bits=8).index
    state = index.state_dict()
    with few_training_rows(), unchanged(index):
        for lost in ("packed_codes", "list_ids"):
            part = {name: tensor for name, tensor in state.items() if name != lost}
            with pytest.raises(RuntimeError, match=f"lacks {lost}"):
                index.load_state_dict(part)
