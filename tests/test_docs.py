"""The documentation: its Python blocks run, its error messages are those that are raised, its links have targets,
and the Japanese pages have the structure of the English ones."""

from __future__ import annotations

import doctest
import functools
import pkgutil
import re
import sys
import traceback
import warnings
from pathlib import Path

import pytest
import torch

import torch_ivf_module

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
PROSE = sorted([*ROOT.glob("*.md"), *ROOT.glob("[a-z]*/README.md"), *(ROOT / "docs").rglob("*.md")])
ENGLISH = {page.relative_to(ROOT).as_posix(): page for page in PAGES if not page.name.endswith(".ja.md")}
JAPANESE = sorted([*ROOT.glob("*.ja.md"), *(ROOT / "docs").glob("*.ja.md")])
BLOCK = re.compile(r"^```(\w*)[^\n]*\n(.*?)^```$", re.DOTALL | re.MULTILINE)
FIGURES = re.compile(r"<!-- (\w+):begin -->.*?<!-- \1:end -->", re.DOTALL)
WITH_PYTHON = [name for name, page in ENGLISH.items() if "```python" in page.read_text(encoding="utf-8")]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", WITH_PYTHON)
def test_code_blocks_run(name, tmp_path, monkeypatch):
    """All Python blocks of a page in order; a block `pytb` after one is the error that it raises."""
    monkeypatch.chdir(tmp_path)
    # Captures the same graph without compiling C++, which takes minutes; test_graph_compile.py compiles.
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    if name.endswith("troubleshooting.md"):
        monkeypatch.setitem(sys.modules, "tqdm", None)  # the page shows the error of a missing tqdm
        warnings.simplefilter("error", UserWarning)  # and warnings, as errors
        warnings.filterwarnings("ignore", "The .grad attribute of a Tensor that is not a leaf")  # by the compiler
    blocks = BLOCK.findall(ENGLISH[name].read_text(encoding="utf-8"))
    names: dict[str, object] = {}
    for (kind, code), (next_kind, said) in zip(blocks, [*blocks[1:], ("", "")], strict=True):
        if kind != "python":
            continue
        program = compile(code, name, "exec")
        if next_kind != "pytb":
            exec(program, names)
            continue
        with pytest.raises(Exception) as caught:  # noqa: PT011 - its kind and its text are compared below
            exec(program, names)
        came = "".join(traceback.format_exception_only(caught.value))
        flags = doctest.NORMALIZE_WHITESPACE | doctest.ELLIPSIS
        assert doctest.OutputChecker().check_output(said, came, flags), f"{name} says\n{said}but it is\n{came}"


@pytest.mark.parametrize("page", PROSE, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_links_point_to_files_and_headings(page):
    text = BLOCK.sub("", page.read_text(encoding="utf-8"))
    for target, anchor in re.findall(r"\]\(([^)#\s]*)(?:#([^)]*))?\)", text):
        if "://" in target:
            continue
        file = page.parent / target if target else page
        assert file.exists(), f"{page.name} links to {target}"
        assert not anchor or anchor in anchors(file), f"{page.name} links to {target}#{anchor}"


def test_changelog_and_citation_are_of_this_version():
    versions = re.findall(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), re.MULTILINE)
    cited = re.findall(r"^version: (\S+)$", (ROOT / "CITATION.cff").read_text(encoding="utf-8"), re.MULTILINE)
    assert [versions[0]] == cited == [torch_ivf_module.__version__]


def anchors(page: Path) -> set[str]:
    """The anchors of the headings of a page, as Markdown renderers name them."""
    headings = re.findall(r"^#+ (.*)$", BLOCK.sub("", page.read_text(encoding="utf-8")), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading).strip().lower().replace(" ", "-") for heading in headings}


def test_the_site_has_every_page_and_public_name():
    """Checks some errors of `make docs`, and missing public names, in less time."""
    menu = set(re.findall(r": ([\w/.-]+\.md)$", (ROOT / "mkdocs.yml").read_text(encoding="utf-8"), re.MULTILINE))
    pages = {page.relative_to(ROOT / "docs").as_posix() for page in (ROOT / "docs").rglob("*.md")}
    assert pages <= menu
    reference = "".join(page.read_text(encoding="utf-8") for page in (ROOT / "docs" / "api").glob("*.md"))
    named = re.findall(r"^::: (\S+)$", reference, re.MULTILINE)
    for name in named:
        assert pkgutil.resolve_name(name)
    assert set(torch_ivf_module.__all__) <= {name.rpartition(".")[2] for name in named}


@pytest.mark.parametrize("page", JAPANESE, ids=lambda page: page.name)
def test_japanese_pages_have_the_structure_of_the_english_ones(page):
    """The same headings, code, tables and pictures in the same order; benchmark figures are in English pages only."""
    english = page.with_name(page.name.replace(".ja.md", ".md"))
    assert _structure(page) == _structure(english)


@pytest.mark.parametrize("name", ["README.md", "README.ja.md"])
def test_the_readme_is_short(name):
    assert len((ROOT / name).read_text(encoding="utf-8").splitlines()) <= 250


def _structure(page: Path) -> list[str]:
    text = FIGURES.sub("", page.read_text(encoding="utf-8"))
    found = []
    for part in re.split(r"(^```.*?^```$)", text, flags=re.DOTALL | re.MULTILINE):
        if part.startswith("```"):
            found.append(part)
            continue
        for line in part.splitlines():
            if line.startswith("#"):
                found.append(f"{line.split()[0]} heading")
            elif line.startswith("|"):
                found.append(f"table row of {line.count('|') - 1}")
            elif line.startswith("- "):
                found.append("item")
            found += re.findall(r"!\[[^]]*\]\(([^)]*)\)", line)
    return found
