"""Imports never point up, and optional packages are imported only where they are used."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

import torch_ivf_module

ROOT = Path(torch_ivf_module.__file__).parent
NAME = ROOT.name
# From the lowest to the highest; a part may import those of its own level and below. `_optional` only finds
# other packages; `__init__` is the library as its users see it, which is what the programs above it see too.
LEVELS = [
    ("_arrays", "_crc32", "_files", "_optional", "_pytorch", "_torch_internals"),
    ("photographs",),
    ("functional",),
    ("native",),
    ("params",),
    ("index",),
    ("graph", "torchscript", "parallel", "averaging", "dcp", "sharded"),
    ("faiss_bridge", "faiss_export", "torch_ivf_bridge"),
    ("checkpoint", "tune"),
    ("hub", "export", "plotting"),
    ("__init__",),
    ("demo", "commands", "verification"),
    ("cli",),
    ("__main__",),
]
LEVEL = {name: level for level, names in enumerate(LEVELS) for name in names}
OPTIONAL = {
    "faiss",
    "onnx",
    "onnxruntime",
    "onnxscript",
    "sklearn",
    "tqdm",
    "matplotlib",
    "safetensors",
    "huggingface_hub",
    "h5py",
    "pyarrow",
    "psutil",
    "PIL",
}
FILES = sorted(ROOT.rglob("*.py"))


class Import(NamedTuple):
    module: str  # absolute, dotted
    line: int
    inside: bool  # of a function, and so run only when that is called


def part_of(file: Path) -> str:
    """The name in LEVELS that a file belongs to."""
    return file.relative_to(ROOT).parts[0].removesuffix(".py")


def imports(file: Path) -> Iterator[Import]:
    """Every import in a file, relative ones made absolute, `from package import module` as the module."""
    package = [NAME, *file.relative_to(ROOT).parts[:-1]]

    def visit(node: ast.AST, inside: bool) -> Iterator[Import]:
        if isinstance(node, ast.Import):
            yield from (Import(alias.name, node.lineno, inside) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            base = [*base, *(node.module.split(".") if node.module else [])]
            for alias in node.names:
                yield Import(".".join(_module_of(base, alias.name)), node.lineno, inside)
        inside = inside or isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        for child in ast.iter_child_nodes(node):
            yield from visit(child, inside)

    yield from visit(ast.parse(file.read_text()), False)


def _module_of(base: list[str], name: str) -> list[str]:
    if base[0] != NAME:
        return base
    folder = ROOT.joinpath(*base[1:])
    return [*base, name] if (folder / name).is_dir() or (folder / f"{name}.py").exists() else base


def for_types_only(file: Path) -> set[int]:
    """Lines below `if TYPE_CHECKING:`, which never run."""
    lines: set[int] = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
            lines.update(range(node.lineno, (node.body[-1].end_lineno or 0) + 1))
    return lines


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(ROOT)))
def test_imports_point_down(file):
    part = part_of(file)
    assert part in LEVEL, f"{part} has no place in the order of levels"
    ignored = for_types_only(file)
    for found in imports(file):
        if found.module.partition(".")[0] != NAME or found.line in ignored:
            continue
        other = (found.module.split(".")[1:] or ["__init__"])[0]
        lazily = part == "index" and other in ("checkpoint", "graph", "hub", "plotting") and found.inside
        assert LEVEL[other] <= LEVEL[part] or lazily, (
            f"{file}:{found.line} imports {found.module}, which is above"
        )


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(ROOT)))
def test_optional_packages_are_imported_inside_functions(file):
    for found in imports(file):
        if found.module.partition(".")[0] in OPTIONAL:
            assert found.inside, f"{file}:{found.line} imports {found.module} for everybody"


def test_functional_imports_torch_only():
    allowed = {"torch", NAME, *sys.stdlib_module_names}
    for file in FILES:
        if part_of(file) == "functional":
            for found in imports(file):
                assert found.module.partition(".")[0] in allowed, (
                    f"{file}:{found.line} imports {found.module}"
                )


def test_functional_knows_no_modules_or_parameters():
    """It takes tensors and plain values: no class of it is an nn.Module."""
    for file in FILES:
        if part_of(file) == "functional":
            tree = ast.parse(file.read_text())
            bases = [
                ast.unparse(base)
                for node in ast.walk(tree)
                if isinstance(node, ast.ClassDef)
                for base in node.bases
            ]
            assert not [base for base in bases if "Module" in base]


def test_the_checker_sees_what_it_should(tmp_path):
    """A checker that finds nothing would pass as well."""
    found = list(imports(ROOT / "index" / "base.py"))
    assert any(item.module.startswith(f"{NAME}.functional") for item in found)
    assert any(item.module == "torch" for item in found)
    tree = [item.module for item in imports(ROOT / "__init__.py")]
    assert f"{NAME}.index" in tree
    assert f"{NAME}.checkpoint" in tree


def test_public_names_are_where_users_look_for_them():
    from torch_ivf_module import index

    for name in ("IndexFlatL2", "IndexFlatIP", "IndexIVFFlat", "SearchParams"):
        assert getattr(torch_ivf_module, name) is getattr(index, name)
        assert name in torch_ivf_module.__all__
    assert callable(torch_ivf_module.load)
    assert (ROOT / "py.typed").exists()


def test_without_pytorch_the_import_says_how_to_get_it():
    script = f"import sys; sys.modules['torch'] = None\nimport {NAME}"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False, cwd=ROOT.parent)
    assert done.returncode == 1
    assert "ImportError: torch_ivf_module needs PyTorch" in done.stderr
    assert "https://pytorch.org" in done.stderr
    assert "pip install 'torch-ivf-module[pytorch]'" in done.stderr


def test_importing_the_package_imports_nothing_optional():
    script = (
        "import sys, torch\n"
        "before = set(sys.modules)\n"
        f"import {NAME}\n"
        f"print(sorted({{m.partition('.')[0] for m in set(sys.modules) - before}} & {OPTIONAL!r}))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True, cwd=ROOT.parent
    )
    assert done.stdout.strip() == "[]"


def test_submodules_are_attributes_without_an_import_of_their_own():
    script = (
        f"import sys, {NAME} as t\n"
        f"assert '{NAME}.export' not in sys.modules\n"
        "assert {'export', 'functional', 'native', 'load'} <= set(dir(t))\n"
        "assert callable(t.export.to_onnx) and callable(t.functional.kmeans)\n"
        "assert t.native.available() in (True, False)\n"
        f"from {NAME} import export\n"
        f"from {NAME}.functional import kmeans\n"
        "assert export is t.export and kmeans is t.functional.kmeans\n"
        "assert not hasattr(t, 'nothing')\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True, cwd=ROOT.parent)
