"""8-bit codes: their error, the bounds of scores, and the layout of the panels."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.coded import coded_list, reference_codes
from tests.datasets import normal
from tests.problems import METRICS, each_metric
from torch_ivf_module.functional import codec
from torch_ivf_module.functional import metric as metrics

TINY = torch.finfo(torch.float32).tiny
DIMS = (1, 2, 3, 4, 5, 31, 64, 127, 768, 4096)


def _rows(kind: str, n: int, d: int, generator: torch.Generator) -> Tensor:
    """Rows (n, d) that are hard to code: some of them are extreme."""
    rows = torch.randn(n, d, generator=generator)
    if kind == "ties":
        rows = rows.round()
    if kind == "copies":
        rows = rows[torch.randint(0, min(3, n), (n,), generator=generator)]
    if kind == "far":
        rows = rows + 1000
    if kind == "denormal":
        rows = rows * 1e-41
    if kind == "one enormous":
        rows[n // 2] *= 1e18
    if kind == "magnitudes":
        rows = rows * 10.0 ** torch.randint(-25, 18, (n, 1), generator=generator)
    if kind == "constant":
        rows = rows[:, :1].expand(n, d).clone()
    if kind == "zeros":
        rows[::2] = 0
    if kind == "one coordinate":
        rows = torch.zeros(n, d)
        rows[torch.arange(n), torch.randint(0, d, (n,), generator=generator)] = torch.randn(n, generator=generator)
    return rows


KINDS = (
    "normal",
    "ties",
    "copies",
    "far",
    "denormal",
    "one enormous",
    "magnitudes",
    "constant",
    "zeros",
    "one coordinate",
)
cases = st.tuples(st.sampled_from(KINDS), st.sampled_from(DIMS), st.integers(1, 70), st.integers(0, 2**31))


@settings(max_examples=150, deadline=None)
@given(cases)
def test_the_error_of_a_row_is_within_its_bound(case):
    kind, d, n, seed = case
    rows = _rows(kind, n, d, torch.Generator().manual_seed(seed))
    centre = rows.mean(0)
    codes, scale, error = codec.encode(rows, centre)
    assert codes.dtype == torch.int8
    assert codes.min() >= -127
    residual = rows.double() - centre.double()
    off = residual - scale.double()[:, None] * codes.double()
    assert (torch.linalg.vector_norm(off, dim=1) <= error.double()).all()
    # Half a step in each coordinate at most, except for rows below the smallest normal number.
    assert (off.abs() <= 0.5001 * scale.double()[:, None]).all()
    assert (scale >= TINY).all()


@settings(max_examples=150, deadline=None)
@given(cases, st.sampled_from(METRICS), st.integers(1, 20))
def test_no_result_is_excluded(case, metric, k):
    """Every exact score, as computed in float32, is within its bounds, so the k best are among the candidates."""
    kind, d, n, seed = case
    generator = torch.Generator().manual_seed(seed)
    rows = metrics.prepare(_rows(kind, n, d, generator), metric)
    x = metrics.prepare(torch.cat([_rows(kind, 3, d, generator), rows[:2]]), metric)
    centre, coded, limits, _ = coded_list(rows)
    lower, upper = codec.score_bounds(x, centre, coded, limits, metric)
    exact = metrics.exact_scores(x, rows[coded.rows].expand(len(x), -1, -1).clone(), metric).double()
    exact = exact / 2 if metrics.by_differences(metric) else exact
    finite = exact.isfinite()
    assert ((lower <= exact) & (exact <= upper))[finite].all()
    kept = codec.candidates(lower, upper, k)
    best = exact.masked_fill(~finite, -torch.inf).topk(min(k, n), dim=1)
    assert (kept.gather(1, best.indices) | best.values.isneginf()).all()


def test_bounds_exclude_most_rows():
    """Bounds that are always infinite would pass the test above."""
    rows, x = normal(2000, 128, seed=1), normal(20, 128, seed=2)
    centre, coded, limits, _ = coded_list(rows)
    for metric in ("l2", "ip"):
        lower, upper = codec.score_bounds(x, centre, coded, limits, metric)
        assert codec.candidates(lower, upper, 10).sum(1).float().mean() < 40


@each_metric
def test_overflowing_squares_exclude_nothing(metric):
    rows = normal(40, 8) * 1e30
    centre, coded, limits, _ = coded_list(rows)
    lower, upper = codec.score_bounds(rows[:3], centre, coded, limits, metric)
    assert not lower.isnan().any()
    assert not upper.isnan().any()
    if metric == "l2":
        assert upper.isposinf().all()


def test_decoded_rows_are_near_the_rows():
    rows = normal(50, 20)
    codes, scale, error = codec.encode(rows, rows.mean(0))
    off = torch.linalg.vector_norm(codec.decode(codes, scale, rows.mean(0)) - rows, dim=1)
    assert (off <= error * 1.001).all()
    assert (error < 0.05).all()


@pytest.mark.parametrize("d", [1, 4, 7])
def test_panels_unpack_to_what_was_packed(d):
    sizes = [0, 1, 32, 33, 100]
    packed, offsets = normal(sum(sizes), d), torch.tensor([0, *sizes]).cumsum(0)
    codes = reference_codes(packed, offsets, torch.tensor([*sizes, 0]))
    assert codes.first.tolist() == [0, 0, 1, 2, 4, 8]
    assert codes.panels.numel() == 8 * codec.panel_bytes(d)
    for number, size in enumerate(sizes):
        _, expected, *_ = coded_list(packed[offsets[number] : offsets[number] + size])
        for found, column in zip(codec.unpack(codes, number), expected, strict=True):
            assert torch.equal(found, column)


def test_a_list_of_several_runs_unpacks():
    packed = normal(codec.RUN + 70, 1)
    codes = reference_codes(packed, torch.tensor([0, len(packed)]), torch.tensor([len(packed), 0]))
    rows = codec.unpack(codes, 0).rows
    assert torch.equal(rows.sort().values, torch.arange(len(packed)))
    assert rows[: codec.RUN].max() == codec.RUN - 1


def test_norms_are_bounded_linearly():
    norms, g = torch.rand(100).double(), torch.tensor(0.4).double()
    bound = codec.norm_bound(norms.square() / 2, g)
    assert (bound >= norms - 1e-15).all()
    assert codec.norm_bound(g.square() / 2, g) == pytest.approx(float(g))
