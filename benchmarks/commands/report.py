"""Write what is made of the stored figures: docs/benchmarks.md, its plots, and the tables of other pages."""

import argparse
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path

from .. import device, results
from ..cases import CASES
from ..page import SHOWN, Tasks, aims, caption, page, query_filters, which_index
from ..tables import CODES, TABLES, pivot

ROOT = Path(__file__).resolve().parents[2]
BEGIN, END = "<!-- benchmark:begin -->", "<!-- benchmark:end -->"
# Of each README: what the chart shows, the corner of the tables, the data of the cases, the versions.
READMES = {
    "README.md": (
        "Queries/s against the number of queries in a batch",
        "queries/s (× faiss-cpu)",
        {name: CASES[name].description for name in ("headline", "photographs")},
        "Measured with {}. All figures: [docs/benchmarks.md](docs/benchmarks.md).",
    ),
    "README.ja.md": (
        "バッチあたりのクエリ数と毎秒クエリ数",
        "クエリ/秒 (faiss-cpu 比)",
        {
            "headline": "ガウス乱数 262,144 × 128、nlist 512(先頭 20,480 行で学習)、nprobe 32、L2",
            "photographs": "写真 2 枚の 8×8×3 パッチ 262,144 × 192、nlist 512、nprobe 8、L2",
        },
        "使用した版: {}。すべての数値: [docs/benchmarks.md](docs/benchmarks.md)。",
    ),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("files", nargs="*", type=Path, help="default: benchmarks/benchmarks.jsonl")
    parser.add_argument("--device", default="cpu", help="report what was measured there, on pages of its own")
    parser.add_argument("--root", type=Path, default=ROOT, help="where docs/ and README.md are")


def run(options: argparse.Namespace) -> int:
    kind = options.device
    tasks = stored(options.files or [device.variant(results.DEFAULT, kind)], kind)
    if not tasks:
        print("no finished measurement is stored yet: run `python -m benchmarks run` first")
        return 0
    images = options.root / "docs" / device.images(kind)
    images.mkdir(parents=True, exist_ok=True)
    for path, text in texts(tasks, options.root, kind):
        path.write_text(text, encoding="utf-8")
        print(f"wrote {path.relative_to(options.root)}")
    from ..plots import plots  # imports matplotlib

    drawn = plots(tasks)
    for name, draw in drawn.items():
        (images / name).write_text(draw(), encoding="utf-8")
    print(f"drew {len(drawn)} plots in docs/{device.images(kind)}")
    return 0


def stored(files: Iterable[Path], kind: str = "cpu") -> Tasks:
    """The last finished run of each (case, task) that has figures on this kind of device."""
    return {key: task for key, task in results.latest(files, kind).items() if task.rows}


def texts(tasks: Tasks, root: Path, kind: str = "cpu") -> Iterator[tuple[Path, str]]:
    """Each page that is made of the figures, as it should be; of those of an accelerator, one page.

    A README without markers for its block is unchanged.
    """
    yield device.variant(root / "docs" / "benchmarks.md", kind), page(tasks, kind)
    if kind != "cpu":
        return
    blocks = {"docs/scalar-quantizers.md": [which_index(tasks)], "docs/filters.md": [query_filters(tasks)]}
    if ("headline", "search") in tasks:
        blocks |= {name: [part for part in _block(tasks, *readme) if part] for name, readme in READMES.items()}
    for path, parts in ((root / name, parts) for name, parts in blocks.items()):
        before = path.read_text(encoding="utf-8") if path.exists() else ""
        if BEGIN in before and END in before and parts[0]:
            yield path, before.split(BEGIN)[0] + "\n\n".join([BEGIN, *parts, END]) + before.split(END)[1]


def _block(tasks: Tasks, chart: str, corner: str, cases: dict[str, str], versions: str) -> Iterator[str]:
    yield f"![{chart}](docs/img/headline.svg)"
    for task in (tasks[name, "search"] for name in cases if (name, "search") in tasks):
        rows = [row for row in task.rows if row["engine"] in SHOWN]
        yield f"{cases[task.case]}:"
        yield pivot(replace(TABLES["search"], corner=corner, figures=CODES), rows)
        yield aims(task)
        yield caption(task)
    found = tasks["headline", "search"].facts["versions"]
    names = [f"{name} {found[name]}" for name in ("torch", "faiss-cpu", "torch-ivf") if name in found]
    yield versions.format(", ".join(names))
