"""The demo on small data, and the comparison of ids behind its --verify. No time is asserted."""

from __future__ import annotations

import argparse
import builtins

import pytest
import torch

from tests.problems import each_metric
from torch_ivf_module import IndexIVFFlat, demo, native
from torch_ivf_module.cli import main
from torch_ivf_module.verification import brute_force, same_answers, verify

SMALL = ["demo", "--dim", "8", "--nb", "600", "--nq", "20", "--nlist", "8", "--nprobe", "1", "4", "--topk", "3"]


@pytest.fixture(autouse=True)
def _without_pauses(monkeypatch):
    pytest.importorskip("tqdm")
    monkeypatch.setattr(native.library._library, "switched_off", True)
    monkeypatch.setattr(demo.time, "sleep", lambda seconds: None)
    assert not native.enabled()


@each_metric
def test_demo_compares_saves_and_plots(tmp_path, capsys, metric, faiss):
    pytest.importorskip("matplotlib")
    picture, saved = tmp_path / "demo.png", tmp_path / "demo.pt"
    assert main([*SMALL, "--metric", metric, "--verify", "--plot", str(picture), "--save", str(saved)]) == 0
    printed = capsys.readouterr().out
    assert "nprobe  recall@3  queries/s  faiss recall@3  faiss queries/s  times faiss" in printed
    assert "verify  nprobe 4: 20 of 20 queries as faiss" in printed
    assert "same answers: yes" in printed
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert saved.stat().st_size > 600 * 8 * 4


def test_demo_without_faiss_compares_with_brute_force(capsys, monkeypatch):
    real = builtins.__import__
    monkeypatch.setattr(
        demo, "require", lambda name, extra: _missing() if name == "faiss" else real(name, fromlist=["tqdm"])
    )
    assert main([*SMALL, "--verify"]) == 0
    printed = capsys.readouterr().out
    assert "no faiss: its columns are skipped" in printed
    assert "verify  nprobe 1: 20 of 20 queries as brute force over the probed lists" in printed


def _missing():
    raise ImportError("no faiss")


@pytest.fixture
def built():
    base, queries = torch.randn(420, 6, generator=torch.Generator().manual_seed(0)).split([400, 20])
    index = IndexIVFFlat(6, nlist=8, nprobe=2).train(base)
    index.add(base)
    return index, base, queries


def test_verify_detects_a_wrong_id(built, capsys):
    index, base, queries = built
    ids = index.search(queries, 3)[1]
    assert verify(index, base, queries, {2: [ids]})
    far = torch.cdist(queries, base).argmax(1)
    assert not verify(index, base, queries, {2: [torch.cat((ids[:, :2], far[:, None]), 1)]})
    assert "20 WRONG" in capsys.readouterr().out


def test_ties_are_equal_but_no_id_counts_twice(built):
    _, base, queries = built
    base = torch.cat((base, base[:1]))  # row 400 is row 0 again
    mine, other = torch.tensor([[0, 5]]), torch.tensor([[400, 5]])
    assert same_answers(base, queries[:1], "l2", mine, other)
    assert not same_answers(base, queries[:1], "l2", torch.tensor([[0, 0]]), torch.tensor([[0, 400]]))
    assert not same_answers(base, queries[:1], "l2", mine, torch.tensor([[0, -1]]))


def test_brute_force_reads_the_probed_lists_only(built):
    index, base, queries = built
    everything = torch.arange(8).expand(20, -1)
    assert torch.equal(brute_force(index, base, queries, everything, 1)[:, 0], torch.cdist(queries, base).argmin(1))
    none = brute_force(index, base, queries, torch.full((20, 1), int(index.list_sizes().argmin())), 400)
    assert int((none[0] >= 0).sum()) == int(index.list_sizes().min())


def test_arguments_of_the_demo_are_checked():
    parser = argparse.ArgumentParser()
    demo.add_arguments(parser)
    assert parser.parse_args([]).nprobe == [1, 4, 8, 16, 32]
    with pytest.raises(SystemExit):
        parser.parse_args(["--nb", "0"])
