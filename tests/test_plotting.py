"""Plots show the given numbers on the given axes; without matplotlib the error names the extra."""

from __future__ import annotations

import io
import sys

import numpy as np
import pytest
import torch

from torch_ivf_module import IndexIVFFlat
from torch_ivf_module.plotting import plot_list_sizes, plot_recall
from torch_ivf_module.tune import Point, Tuned

figures = pytest.importorskip("matplotlib.figure")


@pytest.fixture
def axes():
    return figures.Figure().subplots()


@pytest.fixture(scope="module")
def index():
    x = torch.randn(800, 8, generator=torch.Generator().manual_seed(0))
    index = IndexIVFFlat(8, nlist=16).fit(x)
    index.add(x)
    return index


def drawn(axes) -> None:
    axes.figure.savefig(io.BytesIO(), format="svg")


def test_the_histogram_counts_every_list_once(index, axes):
    assert index.plot(axes) is axes
    assert sum(bar.get_height() for bar in axes.patches) == 16
    assert [line.get_label() for line in axes.get_lines()] == ["mean 50"]
    assert axes.get_yscale() == "linear"
    drawn(axes)


@pytest.mark.parametrize("sizes", [[3] * 5, [0, 0, 0], [0, 1], [1] * 99 + [5_000]])
def test_plot_of_list_sizes(sizes, axes):
    plot_list_sizes(torch.tensor(sizes), axes)
    assert sum(bar.get_height() for bar in axes.patches) == len(sizes)
    assert axes.get_yscale() == ("log" if max(sizes) == 5_000 else "linear")
    drawn(axes)


def test_the_curve_shows_all_settings_and_the_chosen_one(axes):
    curve = [Point(2, None, 0.7, 2e-5), Point(1, None, 0.5, 1e-5), Point(2, 90, 0.65, 1.5e-5)]
    found = Tuned(2, 90, 0.65, 1.5e-5, True, None, curve)
    assert plot_recall(found, axes) is axes
    unlimited, limited, chosen = axes.get_lines()
    assert unlimited.get_xydata() == pytest.approx(np.array([[0.5, 1e5], [0.7, 5e4]]))
    assert limited.get_xydata() == pytest.approx(np.array([[0.65, 1 / 1.5e-5]]))
    assert chosen.get_label() == "chosen: nprobe 2, 90 rows"
    assert [text.get_text() for text in axes.texts] == ["1", "2"]
    drawn(axes)


def test_errors_of_plotting_name_the_argument(axes):
    with pytest.raises(TypeError, match="index must be an inverted file or the sizes of its lists, got list"):
        plot_list_sizes([1, 2], axes)
    with pytest.raises(RuntimeError, match="train it"):
        IndexIVFFlat(8, nlist=4).plot(axes)
    with pytest.raises(ValueError, match="no points"):
        plot_recall([], axes)


def test_without_matplotlib_the_extra_is_named(index, monkeypatch):
    for name in [name for name in sys.modules if name.partition(".")[0] == "matplotlib"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ImportError, match=r"torch-ivf-module\[plot\]"):
        index.plot()
