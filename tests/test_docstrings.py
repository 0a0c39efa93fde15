"""Every public name has a docstring with an example that runs, and type annotations."""

from __future__ import annotations

import doctest
import importlib
import inspect
import pkgutil

import pytest

import torch_ivf_module

SKIPPED = ("__main__", "torch_utils")  # change the process when imported
MODULES = sorted(
    name
    for _, name, _ in pkgutil.walk_packages(torch_ivf_module.__path__, f"{torch_ivf_module.__name__}.")
    if not name.endswith(SKIPPED)
)


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
@pytest.mark.parametrize("name", [torch_ivf_module.__name__, *MODULES])
def test_doctests(name):
    # Some need their library: the docs page of the adaptors has an example of each, and Triton is part of other builds.
    if ".integrations." in name or ".gpu." in name:
        pytest.importorskip(name, exc_type=ImportError)
    module = importlib.import_module(name)
    assert module.__doc__
    flags = doctest.NORMALIZE_WHITESPACE | doctest.ELLIPSIS
    assert doctest.testmod(module, optionflags=flags).failed == 0


@pytest.mark.parametrize("name", torch_ivf_module.__all__)
def test_public_names_are_documented(name):
    item = getattr(torch_ivf_module, name)
    assert inspect.getdoc(item)
    assert ">>>" in item.__doc__
    if inspect.isclass(item):
        for member, value in inspect.getmembers(item, callable):
            own = member in vars(item) or any(member in vars(base) for base in item.__mro__ if _ours(base))
            if own and not member.startswith("_"):
                assert inspect.getdoc(value), f"{name}.{member} has no docstring"
                _is_annotated(value, f"{name}.{member}")
    else:
        _is_annotated(item, name)


def _is_annotated(function, name):
    signature = inspect.signature(function)
    assert signature.return_annotation is not inspect.Signature.empty, f"{name} does not say what it returns"
    for parameter in signature.parameters.values():
        said = parameter.annotation is not inspect.Parameter.empty or parameter.name == "self"
        assert said, f"{name} does not say what {parameter.name} is"


def _ours(kind):
    return kind.__module__.startswith(torch_ivf_module.__name__)
