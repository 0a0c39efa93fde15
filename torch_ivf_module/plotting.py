"""Pictures of an index and of what `tune` tried, with matplotlib (extra `plot`).

L lists. Each function draws on the axes it is given, or on those of a new figure, and returns them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from ._optional import require
from .index import IndexIVF
from .tune import Point, Tuned

__all__ = ["plot_list_sizes", "plot_recall"]

_BINS = 40
_UNEVEN = 10  # means long, a longest list would leave all others in one bar: lists are then counted on a log scale
_COLOUR, _MARKED = "#0072B2", "#D55E00"  # colour-blind people can tell these apart


def plot_list_sizes(index: IndexIVF | Tensor, ax: Any = None) -> Any:
    """Draw a histogram of the list sizes, with the mean marked.

    Parameters
    ----------
    index : a trained inverted file, or the sizes (L,) of its lists, from `index.list_sizes()`.
    ax : the matplotlib axes to draw on; new ones by default.

    Returns the axes. Raises RuntimeError for an index without lists, TypeError for anything else, ImportError (naming
    the extra `plot`) without matplotlib.

    >>> import torch
    >>> from torch_ivf_module import IndexIVFFlat
    >>> x = torch.randn(1000, 16, generator=torch.Generator().manual_seed(0))
    >>> index = IndexIVFFlat(16, nlist=16).fit(x)
    >>> index.add(x)
    >>> plot_list_sizes(index).get_xlabel()
    'vectors in a list'
    """
    if not isinstance(index, (IndexIVF, Tensor)):
        raise TypeError(f"index must be an inverted file or the sizes of its lists, got {type(index).__name__}")
    sizes = (index if isinstance(index, Tensor) else index.list_sizes()).cpu().double()
    if not sizes.numel():
        raise RuntimeError("index has no lists yet: train it before plotting them")
    axes, mean = _axes(ax), float(sizes.mean())
    bins = min(_BINS, int(sizes.max()) + 1)
    axes.hist(sizes.numpy(), bins=bins, range=(0, max(1.0, float(sizes.max()))), color=_COLOUR, alpha=0.85)
    axes.axvline(mean, color=_MARKED, ls="--", label=f"mean {mean:,.0f}")
    if float(sizes.max()) > _UNEVEN * mean:
        axes.set_yscale("log")
    axes.set(xlabel="vectors in a list", ylabel="lists", title=f"{sizes.numel():,} lists")
    axes.xaxis.set_major_formatter("{x:,.0f}")
    axes.legend(frameon=False)
    return axes


def plot_recall(found: Tuned | Sequence[Point], ax: Any = None) -> Any:
    """Plot queries/s against recall: all settings that `tune` measured, and the one that it chose.

    Parameters
    ----------
    found : the result of `tune`, or points of its curve.
    ax : the matplotlib axes to draw on; new ones by default.

    Points without a budget are joined by a line and labelled with their nprobe; points with a budget are single marks.
    Returns the axes. Raises ValueError for no points, ImportError (naming the extra `plot`) without matplotlib.

    >>> curve = [Point(1, None, 0.6, 1e-5), Point(4, None, 0.9, 3e-5), Point(4, 500, 0.88, 2e-5)]
    >>> axes = plot_recall(curve)
    >>> [line.get_label() for line in axes.get_lines()]
    ['all rows', 'a budget of rows']
    """
    curve = found.curve if isinstance(found, Tuned) else list(found)
    if not curve:
        raise ValueError("found has no points to plot: pass the result of `tune`, or its curve")
    axes = _axes(ax)
    whole = sorted((p for p in curve if p.budget is None), key=lambda point: point.nprobe)
    limited = [p for p in curve if p.budget is not None]
    for points, style, label in ((whole, "o-", "all rows"), (limited, "x", "a budget of rows")):
        if points:
            axes.plot(*_at(points), style, color=_COLOUR, ms=5, label=label)
    beside = {"xytext": (4, 4), "textcoords": "offset points", "fontsize": 8}
    for point in whole:
        axes.annotate(str(point.nprobe), (point.recall, 1 / point.seconds), **beside)
    if isinstance(found, Tuned):
        chosen = f"chosen: nprobe {found.nprobe}" + ("" if found.budget is None else f", {found.budget:,} rows")
        axes.plot([found.recall], [1 / found.seconds], "o", color=_MARKED, ms=11, mfc="none", mew=2, label=chosen)
    axes.set(xlabel="recall", ylabel="queries/s", yscale="log")
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    return axes


def _axes(ax: Any) -> Any:
    return require("matplotlib.pyplot", "plot").subplots()[1] if ax is None else ax


def _at(points: Sequence[Point]) -> tuple[list[float], list[float]]:
    """Where points lie: recall, and queries a second."""
    return [point.recall for point in points], [1 / point.seconds for point in points]
