"""faiss_compat in place of faiss, which must not be installed here."""

from __future__ import annotations

import importlib.metadata
import re
from pathlib import Path
from typing import Any

import pytest

from torch_ivf_module import faiss_compat

names = {(part.name or "").lower() for part in importlib.metadata.distributions()}
if found := [name for name in sorted(names) if name.startswith("faiss")]:
    raise RuntimeError(f"these tests are for an environment without faiss, but {', '.join(found)} is installed")
faiss_compat.install()


@pytest.fixture
def documented(tmp_path, monkeypatch):
    """Runs the program under a heading of docs/integrations.md in an empty folder; gives its names."""

    def run(heading: str) -> dict[str, Any]:
        page = Path(__file__).parents[1].joinpath("docs", "integrations.md").read_text(encoding="utf-8")
        section = page.partition(f"\n## {heading}\n")[2].partition("\n## ")[0]
        (program,) = re.findall(r"^```py\n(.*?)^```$", section, re.DOTALL | re.MULTILINE)
        monkeypatch.chdir(tmp_path)
        names: dict[str, Any] = {"__name__": heading}
        exec(program, names)
        return names

    return run
