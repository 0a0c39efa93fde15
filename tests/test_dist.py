"""What is published: the wheel and the sdist are built, looked into, and installed where there is nothing else."""

from __future__ import annotations

import email
import email.message
import shutil
import subprocess
import sys
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest

import torch_ivf_module

pytestmark = pytest.mark.long

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "torch_ivf_module"
MOST_BYTES = 200_000  # of the wheel
SEARCH = """
import torch
from torch_ivf_module import IndexIVFFlat
x = torch.randn(500, 8, generator=torch.Generator().manual_seed(0))
index = IndexIVFFlat(8, nlist=8, nprobe=8).fit(x)
index.add(x)
assert index.search(x[:5], 1)[1].flatten().tolist() == [0, 1, 2, 3, 4]
"""


def run(*command: str | Path, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*map(str, command)], cwd=cwd, capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The wheel and the sdist, of a copy: setuptools would take over what earlier builds left in the checkout."""
    pytest.importorskip("build")
    tree, out = tmp_path_factory.mktemp("dist") / "tree", tmp_path_factory.mktemp("built")
    left = ("*.egg-info", "build", "dist", ".*", "__pycache__")
    shutil.copytree(ROOT, tree, ignore=shutil.ignore_patterns(*left))
    done = run(sys.executable, "-m", "build", "--outdir", out, tree, cwd=out)
    assert done.returncode == 0, done.stdout + done.stderr
    (wheel,), (sdist,) = out.glob("*.whl"), out.glob("*.tar.gz")
    return wheel, sdist


def test_twine_accepts_both(built: tuple[Path, Path]) -> None:
    pytest.importorskip("twine")
    done = run(sys.executable, "-m", "twine", "check", "--strict", *built)
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_wheel_is_the_package_and_nothing_else(built: tuple[Path, Path]) -> None:
    wheel = zipfile.ZipFile(built[0])
    packed = {name for name in wheel.namelist() if ".dist-info/" not in name}
    kinds = ("*.py", "*.cpp", "*.h", "py.typed")
    assert packed == {str(path.relative_to(ROOT)) for kind in kinds for path in PACKAGE.rglob(kind)}
    assert built[0].stat().st_size < MOST_BYTES


def test_the_metadata_says_what_is_so(built: tuple[Path, Path]) -> None:
    wheel = zipfile.ZipFile(built[0])
    (name,) = (name for name in wheel.namelist() if name.endswith(".dist-info/METADATA"))
    facts: email.message.Message = email.message_from_bytes(wheel.read(name))
    assert (facts["Name"], facts["Version"]) == ("torch-ivf-module", torch_ivf_module.__version__)
    required = facts.get_all("Requires-Dist") or []
    assert [line for line in required if "extra ==" not in line] == ["numpy"]
    assert "torch>=2.13; extra == \"pytorch\"" in required
    assert {"plot", "faiss", "export", "pytorch"} <= set(facts.get_all("Provides-Extra") or [])
    assert any(name.endswith("LICENSE") for name in wheel.namelist())


def test_the_sdist_has_what_is_kept_and_no_rubbish(built: tuple[Path, Path]) -> None:
    with tarfile.open(built[1]) as archive:
        packed = {name.partition("/")[2] for name in archive.getnames() if not archive.getmember(name).isdir()}
    kept = {line for line in run("git", "ls-files", cwd=ROOT).stdout.splitlines() if (ROOT / line).exists()}
    if not kept:
        pytest.skip("not a git checkout: nothing says what is kept")
    made = {name for name in packed - kept if name in ("PKG-INFO", "setup.cfg") or ".egg-info/" in name}
    assert packed - kept == made
    # A checkout has what repositories and continuous integration need beside it.
    assert {name for name in kept - packed if not name.startswith(".")} == set()


def test_it_installs_and_searches_where_there_is_nothing_else(built: tuple[Path, Path], tmp_path: Path) -> None:
    venv.create(tmp_path / "venv", with_pip=True)
    programs = tmp_path / "venv" / ("Scripts" if sys.platform == "win32" else "bin")
    python = programs / "python"

    def install(what: str) -> None:
        done = run(python, "-m", "pip", "install", "--no-compile", "-c", ROOT / "constraints.txt", what)
        assert done.returncode == 0, done.stdout + done.stderr

    install(str(built[0]))
    done = run(python, "-c", "import torch_ivf_module", cwd=tmp_path)
    assert "ImportError: torch_ivf_module needs PyTorch" in done.stderr
    install(f"{built[0]}[pytorch]")
    done = run(python, "-W", "error", "-c", SEARCH, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    done = run(programs / "torch-ivf-module", "--help", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "build" in done.stdout
    assert run(programs / "torch-ivf-module", "--version").stdout.split() == [
        "torch_ivf_module",
        torch_ivf_module.__version__,
    ]
