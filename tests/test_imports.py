"""Imports never point up and have no cycle, and optional packages are imported only where they are used."""

from __future__ import annotations

import ast
import graphlib
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

import torch_ivf_module

ROOT = Path(torch_ivf_module.__file__).parent
NAME = ROOT.name
# From the lowest to the highest. A file or folder may import those of its own level and below, also inside functions.
# `_optional` only finds other packages; `__init__` is the library as its users and the programs above it import it.
LEVELS = [
    ("_arrays", "_files", "_optional", "_pytorch", "_torch_internals"),
    ("photographs", "vector_files", "advice"),
    ("functional",),
    ("native", "gpu"),
    ("params",),
    ("index",),
    ("graph", "torchscript", "parallel", "averaging", "dcp", "sharded", "maxsim", "maxsim_graph"),
    ("faiss_bridge", "faiss_codes", "faiss_export", "torch_ivf_bridge", "factory"),
    ("checkpoint", "tune"),
    ("hub", "export", "plotting", "faiss_compat", "integrations", "streaming"),
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
    "anomalib",
    "langchain_core",
    "lightning",
    "pytorch_metric_learning",
    "sentence_transformers",
    "torch_geometric",
    "triton",
}
KERNEL = ROOT / "gpu" / "kernels.py"  # in Triton's language, so imported only inside of functions itself
FILES = sorted(ROOT.rglob("*.py"))


class Import(NamedTuple):
    module: str  # absolute, dotted
    line: int
    inside: bool  # whether it is in a function, and so runs only when that is called


def level_name(file: Path) -> str:
    """The name in LEVELS that a file belongs to."""
    return file.relative_to(ROOT).parts[0].removesuffix(".py")


def imports(file: Path) -> Iterator[Import]:
    """Every import in a file except those below `if TYPE_CHECKING:`, which never run.

    Relative imports are made absolute; `from package import module` counts as an import of the module.
    """
    package = [NAME, *file.relative_to(ROOT).parts[:-1]]

    def visit(node: ast.AST, inside: bool) -> Iterator[Import]:
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
            for child in node.orelse:
                yield from visit(child, inside)
            return
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


def own_imports(file: Path) -> list[Import]:
    """The imports of modules of this package."""
    return [item for item in imports(file) if item.module.partition(".")[0] == NAME]


def file_of(module: str) -> Path:
    """The file of a module of this package, `__init__.py` for a package."""
    path = ROOT.joinpath(*module.split(".")[1:])
    return path / "__init__.py" if path.is_dir() else path.with_suffix(".py")


def cycle(graph: dict[Path, set[Path]]) -> list[str]:
    """One cycle in a graph of imports, file -> imported files, or []."""
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as error:
        return [str(file.relative_to(ROOT)) for file in error.args[1]]
    return []


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(ROOT)))
def test_imports_point_down(file):
    name = level_name(file)
    assert name in LEVEL, f"{name} is in no level"
    for item in own_imports(file):
        other = (item.module.split(".")[1:] or ["__init__"])[0]
        assert LEVEL[other] <= LEVEL[name], f"{file}:{item.line} imports {item.module}, which is above"


def test_imports_have_no_cycle():
    graph = {file: {file_of(item.module) for item in own_imports(file)} for file in FILES}
    assert cycle(graph) == []


def test_modules_of_this_package_are_not_imported_by_name():
    """`import_module("...")` is invisible to the tests above: only lazy attributes and other packages need it."""
    allowed = {ROOT / "__init__.py", ROOT / "_optional.py", ROOT / "_files.py"}
    for file in set(FILES) - allowed:
        names = {node.attr for node in ast.walk(ast.parse(file.read_text())) if isinstance(node, ast.Attribute)}
        names |= {node.id for node in ast.walk(ast.parse(file.read_text())) if isinstance(node, ast.Name)}
        assert not names & {"import_module", "__import__"}, file


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(ROOT)))
def test_optional_packages_are_imported_inside_functions(file):
    for item in imports(file):
        if file == KERNEL:
            assert item.module.partition(".")[0] not in OPTIONAL - {"triton"}
        elif item.module == f"{NAME}.gpu.kernels" or item.module.partition(".")[0] in OPTIONAL:
            assert item.inside, f"{file}:{item.line} imports {item.module} outside of functions"


def test_functional_imports_torch_only():
    allowed = {"torch", NAME, *sys.stdlib_module_names}
    for file in FILES:
        if level_name(file) == "functional":
            for item in imports(file):
                assert item.module.partition(".")[0] in allowed, f"{file}:{item.line} imports {item.module}"


def test_functional_has_no_modules():
    """It takes tensors and plain values: none of its classes is an nn.Module."""
    for file in FILES:
        if level_name(file) == "functional":
            tree = ast.parse(file.read_text())
            bases = [
                ast.unparse(base)
                for node in ast.walk(tree)
                if isinstance(node, ast.ClassDef)
                for base in node.bases
            ]
            assert not [base for base in bases if "Module" in base]


def test_the_checks_see_imports_and_cycles():
    """The tests above would also pass if they saw no imports."""
    modules = [item.module for item in imports(ROOT / "index" / "base.py")]
    assert any(module.startswith(f"{NAME}.functional") for module in modules)
    assert "torch" in modules
    modules = [item.module for item in imports(ROOT / "__init__.py")]
    assert f"{NAME}.index" in modules
    assert f"{NAME}.checkpoint" in modules
    assert f"{NAME}.export" not in modules  # only below TYPE_CHECKING
    assert any(item.inside for item in imports(ROOT / "export.py"))
    assert file_of(f"{NAME}.index") == ROOT / "index" / "__init__.py"
    assert file_of(f"{NAME}.graph") == ROOT / "graph.py"
    a, b, c = (ROOT / name for name in ("a.py", "b.py", "c.py"))
    assert set(cycle({a: {b}, b: {c}, c: {a}})) == {"a.py", "b.py", "c.py"}
    assert cycle({a: {b, c}, b: {c}}) == []


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


# Every fact about the import from one process, since importing torch takes most of its time.
FACTS = f"""
import json, sys, torch
from torch.nn.modules import module

def hooks():
    names = [name for name in dir(module) if name.startswith("_global_") and name.endswith(("hooks", "kwargs"))]
    return {{name: len(getattr(module, name)) for name in names}}

modules, before = set(sys.modules), hooks()
import {NAME} as t
facts = {{"imported": sorted({{name.partition(".")[0] for name in set(sys.modules) - modules}})}}
facts["eager"] = sorted(set(sys.modules) & {{"{NAME}.export", "torch._dynamo"}})
facts.update(hooks=[before, hooks()], names=dir(t))
index = t.IndexFlatL2(2)
index.add(torch.eye(2))
index.search(torch.eye(2).requires_grad_(), 1)
facts["compiler"] = "torch._dynamo" in sys.modules
from {NAME}.functional import kmeans
facts["kmeans"] = kmeans is t.functional.kmeans
facts["native"] = t.native.available() in (True, False)
facts["missing"] = not hasattr(t, "nothing")
from {NAME} import export
facts["export"] = export is t.export and callable(t.export.to_onnx)
print(json.dumps(facts))
"""


@pytest.fixture(scope="module")
def facts():
    done = subprocess.run([sys.executable, "-c", FACTS], capture_output=True, text=True, check=True, cwd=ROOT.parent)
    return json.loads(done.stdout)


def test_importing_the_package_imports_nothing_optional(facts):
    assert NAME in facts["imported"]
    assert not OPTIONAL & set(facts["imported"])
    assert facts["eager"] == []


def test_importing_the_package_registers_no_hook(facts):
    before, after = facts["hooks"]
    assert before
    assert before == after


def test_a_search_does_not_import_the_compiler(facts):
    assert not facts["compiler"]


def test_submodules_are_attributes_that_are_imported_on_first_use(facts):
    assert {"export", "functional", "native", "load"} <= set(facts["names"])
    assert facts["kmeans"]
    assert facts["native"]
    assert facts["export"]
    assert facts["missing"]
