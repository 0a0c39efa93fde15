"""Write what is made of stored figures: docs/benchmarks.md, its plots, and the generated parts of other pages."""

import argparse
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from .. import device, drift, results, scale
from ..blocks import MARKED, fill
from ..page import page
from ..results import Tasks
from ..tables import TABLES

ROOT = Path(__file__).resolve().parents[2]
# Pages of figures that are stored elsewhere: a module with `lines`, `page` and perhaps `plot`.
OWN = {"scale.md": scale, "drift.md": drift}


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

    drawn = plots(tasks) | (_own_plots(options.root) if kind == "cpu" else {})
    for path in images.glob("*-*.svg"):
        if path.name not in drawn and path.stem.partition("-")[0] in TABLES:
            path.unlink()
    for name, draw in drawn.items():
        (images / name).write_text(draw(), encoding="utf-8")
    print(f"drew {len(drawn)} plots in docs/{device.images(kind)}")
    return 0


def _own_plots(root: Path) -> dict[str, Callable[[], str]]:
    """The pictures of the pages in OWN that are there, and what draws each."""
    found = ((name, own) for name, own in OWN.items() if hasattr(own, "plot") and (root / "docs" / name).exists())
    return {f"{Path(name).stem}.svg": lambda own=own: own.plot(own.lines()) for name, own in found}


def stored(files: Iterable[Path], kind: str = "cpu") -> Tasks:
    """The last finished run of each (case, task) that has figures on this kind of device.

    Only figures of one machine can be compared: of others than that of the headline's search there are none.
    """
    found = {key: task for key, task in results.latest(files, kind).items() if task.rows}
    if ("headline", "search") not in found:
        return found
    cpu = found["headline", "search"].facts["cpu"]
    return {key: task for key, task in found.items() if task.facts["cpu"] == cpu}


def texts(tasks: Tasks, root: Path, kind: str = "cpu") -> Iterator[tuple[Path, str]]:
    """Each page that is made of the figures, as it should be; of those of an accelerator, one page."""
    yield device.variant(root / "docs" / "benchmarks.md", kind), page(tasks, kind)
    if kind != "cpu":
        return
    for path in sorted([*root.glob("README*.md"), *(root / "docs").glob("*.md")]):
        text = path.read_text(encoding="utf-8")
        if path.name in OWN:
            yield path, OWN[path.name].page(text, OWN[path.name].lines())
        elif MARKED.search(text):
            yield path, fill(text, tasks, japanese=path.name.endswith(".ja.md"))
