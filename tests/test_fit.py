"""Training: determinism, errors, warnings, progress, training a filled index."""

from __future__ import annotations

import warnings

import pytest
import torch

from tests.datasets import PLAIN, normal
from tests.oracle import check, probed, stored_rows
from tests.problems import each_dtype, each_metric, few_training_rows, shared
from tests.states import unchanged
from torch_ivf_module import IndexIVFFlat


@each_metric
def test_training_is_deterministic_and_leaves_the_global_generator_alone(metric):
    x = normal(400, 8)
    torch.manual_seed(7)
    state = torch.get_rng_state()
    indexes = [IndexIVFFlat(8, nlist=8, metric=metric) for _ in range(5)]
    indexes[0].train(x)
    indexes[1].train(x, seed=1234, niter=10, max_points_per_centroid=256)
    indexes[2].train(x, seed=99)
    indexes[3].train(x, generator=torch.Generator().manual_seed(1234))
    indexes[4].fit(x)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(indexes[0].centroids, indexes[1].centroids)
    assert not torch.equal(indexes[0].centroids, indexes[2].centroids)
    assert torch.equal(indexes[0].centroids, indexes[3].centroids)
    assert torch.equal(indexes[0].centroids, indexes[4].centroids)
    assert indexes[0].centroids.shape == (8, 8)
    assert indexes[0].centroids.dtype == torch.float32
    if metric != "l2":
        torch.testing.assert_close(indexes[0].centroids.norm(dim=1), torch.ones(8))


def test_training_needs_a_row_for_every_list():
    index = IndexIVFFlat(8, nlist=10)
    with unchanged(index), pytest.raises(ValueError, match=r"(?s)(9.*10|10.*9)"):
        index.train(normal(9, 8))
    with few_training_rows():
        index.train(normal(10, 8))
    assert index.is_trained


def test_few_training_rows_are_warned_about_as_in_faiss():
    with pytest.warns(UserWarning, match=r"(?s)389.*390|390.*389"):
        IndexIVFFlat(8, nlist=10).train(normal(389, 8))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        IndexIVFFlat(8, nlist=10).train(normal(390, 8))


def test_training_can_show_its_progress(capsys):
    pytest.importorskip("tqdm")
    index = IndexIVFFlat(8, nlist=4)
    index.train(normal(200, 8), verbose=True)
    shown = capsys.readouterr()
    assert "%" in shown.err + shown.out
    IndexIVFFlat(8, nlist=4).train(normal(200, 8))
    assert capsys.readouterr() == ("", "")


@each_dtype
@each_metric
def test_training_a_filled_index_moves_its_vectors_to_their_new_lists(dtype, metric):
    index, base, queries = shared(PLAIN, metric, dtype)
    index.remove_ids(torch.arange(5))
    index.add(base[:3])
    before = stored_rows(index)
    numbering = int(index.next_id)
    index.train(normal(480, PLAIN.d, seed=44), seed=5)
    after = stored_rows(index)
    one, other = before.ids.argsort(), after.ids.argsort()
    assert torch.equal(before.ids[one], after.ids[other])
    assert torch.equal(before.vectors[one], after.vectors[other])
    assert int(index.next_id) == numbering
    assert (
        probed(index, after.vectors.float(), nprobe=1).allowed[torch.arange(index.ntotal), after.lists].all()
    )
    assert not torch.equal(before.lists[one], after.lists[other])
    check(index.search(queries, 10), queries, after, metric, 10, probed(index, queries))


def test_training_again_after_a_reset():
    index, base, queries = shared()
    index.reset()
    index.train(base + 3)
    index.add(base + 3)
    check(index.search(queries, 10), queries, stored_rows(index), "l2", 10, probed(index, queries))


def test_a_refused_training_keeps_the_centroids():
    index, base, _ = shared()
    bad = base.clone()
    bad[17, 3] = torch.nan
    bad[40, 0] = torch.inf
    with unchanged(index), pytest.raises(ValueError, match=r"\b17\b"):
        index.train(bad)
    with unchanged(index), pytest.raises(ValueError, match="12"):
        index.train(base[:11])
