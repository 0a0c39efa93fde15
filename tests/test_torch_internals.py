"""The private names of PyTorch that the library uses exist, and are used in one file only.

The package is not imported, so that this test names what a release of PyTorch lacks.
"""

from __future__ import annotations

import ast
import functools
from pathlib import Path

import pytest
import torch
import torch._compile  # `import torch` alone may leave it out

PACKAGE = Path(__file__).parents[1] / "torch_ivf_module"
USES = {
    "torch._C._AutoDispatchBelowAutograd": "calling the operator from its autograd kernel",
    "torch._C._are_functorch_transforms_active": "whether a torch.func transform runs, to refuse changes of an index",
    "torch._C._functorch.is_functorch_wrapped_tensor": "whether a tensor belongs to a transform, to refuse such ids",
    "torch._C._dynamo.eval_frame.get_eval_frame_callback": "whether torch.compile would trace what is called now",
    "torch._C._get_dispatch_mode": "whether make_fx, torch.export or torch.func.linearize records, to refuse it",
    "torch._C._is_tracing": "torch.jit.is_tracing, which is asked at every search, without its two Python calls",
    "torch._C._TorchDispatchModeKey.PROXY": "which of the dispatch modes these are",
    "torch._compile._disable_dynamo": "torch.compiler.disable without importing the compiler",
    "torch.utils._python_dispatch._disable_current_modes": "computing with values while torch.export records",
    "torch._mkldnn": "the layout of oneDNN's tensors, to name the conversion",
}
DOCUMENTED = ("torch._inductor",)  # AOTInductor is documented under this name


@pytest.mark.parametrize("name", USES)
def test_the_private_names_exist(name):
    functools.reduce(getattr, name.split(".")[1:], torch)


def test_a_disabled_function_raises_the_given_text():
    """torch.compiler.disable stores its reason in the same attribute as `not_compiled`."""
    disabled = torch.compiler.disable(lambda x: x, reason="because")
    assert disabled._torchdynamo_disable
    assert disabled._torchdynamo_disable_msg == "because"


def private(file: Path) -> set[str]:
    """Names under torch with a component that begins with an underscore."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Attribute):
            found.add(ast.unparse(node))
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level:
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    inner = {name for name in found if name.startswith("torch.") and "._" in name and "(" not in name}
    return {name for name in inner if not name.rpartition(".")[2].startswith("__")}


def test_private_names_of_torch_are_used_in_one_file():
    for file in PACKAGE.rglob("*.py"):
        if file.name != "_torch_internals.py":
            assert not [name for name in private(file) if not name.startswith(DOCUMENTED)], file
    used = private(PACKAGE / "_torch_internals.py")
    assert set(USES) <= used
    assert [name for name in used if not any(f"{known}.".startswith(f"{name}.") for known in USES)] == []
