"""The block of figures in the READMEs, in each language: a chart, tables, from which batch size on ours is faster."""

from __future__ import annotations

from dataclasses import dataclass

from .cases import CASES
from .cells import grid, times
from .page import Tasks, caption
from .results import TaskRun
from .tables.searching import speeds

__all__ = ["LANGUAGES", "SHOWN", "crossover", "filled"]

_BEGIN, _END = "<!-- benchmark:begin -->", "<!-- benchmark:end -->"
_CASES = ("headline", "photographs")
SHOWN = ("ours", "ours-csr", "ours-matrix", "ours-native", "faiss", "torch-ivf")  # engines, in the table and the chart


@dataclass(frozen=True)
class Language:
    chart: str  # what the picture shows
    speed: str  # heading of the table
    about: dict[str, str]  # the data of a case
    mixed: str  # {nq}, {first}, {last}, {most}: faster from a batch size on; {ratio}, {fewest}: slower below it
    always: str
    never: str
    made: str  # {names}, {page}


_ENGLISH = Language(
    chart="Queries/s against the number of queries in a batch",
    speed="queries/s (× faiss-cpu)",
    about={name: CASES[name].about for name in _CASES},
    mixed="`ours` is faster than faiss-cpu in batches of {nq} queries and more ({first} at {nq}, {last} at {most}), "
    "and slower in smaller ones ({ratio} at {fewest}).",
    always="`ours` is faster than faiss-cpu at every batch size ({ratio} at {fewest}, {last} at {most}).",
    never="`ours` is slower than faiss-cpu at the largest batch measured ({last} at {most}).",
    made="Measured with {names}. All figures: [docs/benchmarks.md](docs/benchmarks.md).",
)
_JAPANESE = Language(
    chart="バッチあたりのクエリ数と毎秒クエリ数",
    speed="クエリ/秒 (faiss-cpu 比)",
    about={
        "headline": "ガウス乱数 262,144 × 128、nlist 512(先頭 20,480 行で学習)、nprobe 32、L2",
        "photographs": "写真 2 枚の 8×8×3 パッチ 262,144 × 192、nlist 512、nprobe 8、L2",
    },
    mixed="`ours` は一度に {nq} クエリ以上で faiss-cpu より速く({nq} で {first}、{most} で {last})、"
    "それより少ないと遅くなります({fewest} で {ratio})。",
    always="`ours` はどのバッチサイズでも faiss-cpu より速くなります({fewest} で {ratio}、{most} で {last})。",
    never="`ours` は測った最大のバッチでも faiss-cpu より遅くなります({most} で {last})。",
    made="使用した版: {names}。すべての数値: [docs/benchmarks.md](docs/benchmarks.md)。",
)
LANGUAGES = {"README.md": _ENGLISH, "README.ja.md": _JAPANESE}


def filled(text: str, tasks: Tasks, language: Language) -> str | None:
    """`text` with the figures between its markers; None where it has no markers, or there are no figures."""
    shown = [tasks[name, "search"] for name in _CASES if (name, "search") in tasks]
    if _BEGIN not in text or _END not in text or not shown:
        return None
    blocks = [f"![{language.chart}](docs/img/headline.svg)"] if ("headline", "search") in tasks else []
    for task in shown:
        blocks += [f"{language.about[task.case]}:", _table(task, language), _sentence(task, language), caption(task)]
    versions = shown[0].facts["versions"]
    names = ", ".join(f"{name} {versions[name]}" for name in ("torch", "faiss-cpu", "torch-ivf") if name in versions)
    blocks.append(language.made.format(names=names))
    return text.split(_BEGIN)[0] + "\n\n".join([_BEGIN, *filter(None, blocks), _END]) + text.split(_END)[1]


def _table(task: TaskRun, language: Language) -> str:
    rows = [[engine, *speeds(task, engine)] for engine in task.engines() if engine in SHOWN]
    return grid([language.speed, *(f"nq {nq:,}" for nq in task.values("nq"))], rows)


def crossover(task: TaskRun) -> tuple[dict[int, float], int | None]:
    """Queries/s of ours over those of faiss at each batch size, and the one from which on ours stays ahead, if any."""
    found = {nq: task.ratio("qps", "ours", nq=nq) for nq in task.values("nq")}
    ratios = {nq: ratio for nq, ratio in found.items() if ratio is not None}
    behind = [nq for nq, ratio in ratios.items() if ratio < 1]
    ahead = [nq for nq in ratios if not behind or nq > max(behind)]
    return ratios, min(ahead, default=None)


def _sentence(task: TaskRun, language: Language) -> str:
    ratios, nq = crossover(task)
    if not ratios:
        return ""
    fewest, most = min(ratios), max(ratios)
    said = {"fewest": f"{fewest:,}", "ratio": times(ratios[fewest]), "most": f"{most:,}", "last": times(ratios[most])}
    if nq is None:
        return language.never.format(**said)
    if nq == fewest:
        return language.always.format(**said)
    return language.mixed.format(nq=f"{nq:,}", first=times(ratios[nq]), **said)
