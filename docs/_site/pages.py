"""Add pages and files from outside docs/ to the site, and adapt the links between them.

The README is the first page, the other files in PLACES are pages too, and other files of the repository that a page
links to (an example, a notebook, the licence) are copied. So links work on the site as in a checkout, and no page has
two sources.
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[2]
PLACES = {
    "README.md": "index.md",
    "README.ja.md": "index.ja.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
    "SECURITY.md": "security.md",
    "benchmarks/README.md": "benchmark-program.md",
    "export/README.md": "export-programs.md",
}
_LINK = re.compile(r"(?<=\]\()([^)#\s:]+)(?=[)#])")  # within this repository, for it has no scheme


def on_files(files: Files, config: Any) -> Files:
    """Add the pages above and what the pages link to."""
    for source, place in PLACES.items():
        files.append(File.generated(config, place, abs_src_path=str(ROOT / source)))
    pages = [*(ROOT / source for source in PLACES), *(ROOT / "docs").rglob("*.md")]
    linked = {_source(page, link) for page in pages for link in _LINK.findall(page.read_text(encoding="utf-8"))}
    for source in sorted(linked):
        outside = not source.startswith("docs/") and source not in PLACES
        if outside and (ROOT / source).is_file():
            files.append(File.generated(config, _place(source), abs_src_path=str(ROOT / source)))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Replace the link targets of a page by their paths within the site."""
    source = Path(page.file.abs_src_path)
    start = posixpath.dirname(page.file.src_uri)

    def turned(link: re.Match[str]) -> str:
        return posixpath.relpath(_place(_source(source, link[0])), start or ".")

    return _LINK.sub(turned, markdown)


def _source(page: Path, link: str) -> str:
    """The path within the repository of the target of a link of a page."""
    return posixpath.normpath(posixpath.join(page.parent.relative_to(ROOT).as_posix(), link))


def _place(source: str) -> str:
    """The path within the site of a file of the repository."""
    return PLACES.get(source, source.removeprefix("docs/"))
