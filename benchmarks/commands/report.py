"""Write what is made of the stored figures: docs/benchmarks.md, its plots, and the block in each README."""

import argparse
from collections.abc import Iterable, Iterator
from pathlib import Path

from .. import readme, results
from ..page import Tasks, page

ROOT = Path(__file__).resolve().parents[2]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("files", nargs="*", type=Path, help="default: benchmarks/benchmarks.jsonl")
    parser.add_argument("--root", type=Path, default=ROOT, help="where docs/ and README.md are")


def run(options: argparse.Namespace) -> int:
    tasks = stored(options.files or [results.DEFAULT])
    if not tasks:
        print("no finished measurement is stored yet: run `python -m benchmarks run` first")
        return 0
    images = options.root / "docs" / "img"
    images.mkdir(parents=True, exist_ok=True)
    for path, text in texts(tasks, options.root):
        path.write_text(text, encoding="utf-8")
        print(f"wrote {path.relative_to(options.root)}")
    from ..plots import plots  # imports matplotlib

    drawn = plots(tasks)
    for name, draw in drawn.items():
        (images / name).write_text(draw(), encoding="utf-8")
    print(f"drew {len(drawn)} plots in docs/img")
    return 0


def stored(files: Iterable[Path]) -> Tasks:
    """The last finished run of each (case, task) that has figures."""
    return {key: task for key, task in results.latest(files).items() if task.rows}


def texts(tasks: Tasks, root: Path) -> Iterator[tuple[Path, str]]:
    """Each page that is made of the figures, as it should be. A README without markers for its block is unchanged."""
    yield root / "docs" / "benchmarks.md", page(tasks)
    for name, language in readme.LANGUAGES.items():
        before = (root / name).read_text(encoding="utf-8") if (root / name).exists() else ""
        after = readme.filled(before, tasks, language)
        if after is not None:
            yield root / name, after
