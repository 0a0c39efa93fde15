"""Files stay short enough to read in one go."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import pytest

import torch_ivf_module

PACKAGE = Path(torch_ivf_module.__file__).parent
TESTS = Path(__file__).parent
LIBRARY_LINES, TEST_LINES = 300, 500


def sources(folder: Path) -> list[Path]:
    return sorted(path for pattern in ("*.py", "*.h", "*.cpp") for path in folder.rglob(pattern))


def too_long(paths: Iterable[Path], most: int) -> dict[str, int]:
    """The number of lines of each file that has more than `most`."""
    lines = {str(path): len(path.read_text(encoding="utf-8").splitlines()) for path in paths}
    return {path: count for path, count in lines.items() if count > most}


@pytest.mark.parametrize(("folder", "most"), [(PACKAGE, LIBRARY_LINES), (TESTS, TEST_LINES)], ids=["library", "tests"])
def test_no_file_is_too_long(folder, most):
    assert too_long(sources(folder), most) == {}


def test_the_check_sees_all_files(tmp_path):
    names = {path.name for path in sources(PACKAGE)}
    assert {"__init__.py", "kernel.cpp", "simd.h"} <= names
    (tmp_path / "long.py").write_text("pass\n" * 301)
    assert list(too_long(sources(tmp_path), 300).values()) == [301]
    assert not too_long(sources(tmp_path), 301)
