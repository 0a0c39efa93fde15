"""The block of figures in both READMEs: one chart and one table for each case, with headings in the language."""

from dataclasses import dataclass, replace

from .cases import CASES
from .page import Tasks, caption
from .tables import QPS, TABLES, pivot

SHOWN = ("ours", "ours-csr", "ours-matrix", "faiss", "torch-ivf")  # engines, in the tables and the chart
_BEGIN, _END = "<!-- benchmark:begin -->", "<!-- benchmark:end -->"
_CASES = ("headline", "photographs")


@dataclass(frozen=True)
class Language:
    chart: str  # what the picture shows
    corner: str  # of the tables
    cases: tuple[str, ...]  # the data of each case
    versions: str  # {names}


LANGUAGES = {
    "README.md": Language(
        "Queries/s against the number of queries in a batch",
        "queries/s (× faiss-cpu)",
        tuple(CASES[name].description for name in _CASES),
        "Measured with {names}. All figures: [docs/benchmarks.md](docs/benchmarks.md).",
    ),
    "README.ja.md": Language(
        "バッチあたりのクエリ数と毎秒クエリ数",
        "クエリ/秒 (faiss-cpu 比)",
        (
            "ガウス乱数 262,144 × 128、nlist 512(先頭 20,480 行で学習)、nprobe 32、L2",
            "写真 2 枚の 8×8×3 パッチ 262,144 × 192、nlist 512、nprobe 8、L2",
        ),
        "使用した版: {names}。すべての数値: [docs/benchmarks.md](docs/benchmarks.md)。",
    ),
}


def filled(text: str, tasks: Tasks, language: Language) -> str | None:
    """`text` with the figures between its markers; None where it has no markers, or there are no figures."""
    found = [tasks.get((name, "search")) for name in _CASES]
    shown = {case: task for case, task in zip(language.cases, found, strict=True) if task is not None}
    if _BEGIN not in text or _END not in text or not shown:
        return None
    blocks = [f"![{language.chart}](docs/img/headline.svg)"] if ("headline", "search") in tasks else []
    table = replace(TABLES["search"], corner=language.corner, value=QPS, figures=())
    for case, task in shown.items():
        rows = [row for row in task.rows if row["engine"] in SHOWN]
        blocks += [f"{case}:", pivot(table, rows), caption(task)]
    versions = next(iter(shown.values())).facts["versions"]
    names = ", ".join(f"{name} {versions[name]}" for name in ("torch", "faiss-cpu", "torch-ivf") if name in versions)
    blocks.append(language.versions.format(names=names))
    return text.split(_BEGIN)[0] + "\n\n".join([_BEGIN, *blocks, _END]) + text.split(_END)[1]
