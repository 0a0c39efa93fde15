"""Model files that search: TorchScript, torch.export, AOTInductor and ONNX.

Each function takes a SearchGraph, or any module that holds one (an encoder before it, a head behind it), and writes a
file that runs without this package. The batch is dynamic; everything else is frozen as the graph has it.

>>> import tempfile, torch
>>> from torch_ivf_module import IndexFlatL2, export
>>> index = IndexFlatL2(2)
>>> index.add(torch.eye(2))
>>> with tempfile.TemporaryDirectory() as folder:
...     path = export.to_exported(index.graph(k=1), f"{folder}/search.pt2")
...     export.runner(path, "exported")(torch.eye(2))[1].flatten()
tensor([0, 1])
"""

from __future__ import annotations

import os
import re
import secrets
import shutil
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ._files import beside, check_source, replace, short_name
from ._optional import require
from .graph import SearchGraph
from .params import positive
from .torchscript import ScriptedLists, quietly

__all__ = ["FORMATS", "Agreement", "compare", "runner", "to_aoti", "to_exported", "to_onnx", "to_torchscript"]

ONNX_OPSET = 18
_MOST_BYTES = 1_500_000_000  # protobuf refuses messages beyond 2 GiB, and torch.onnx stops short of that
_MOST_BATCH = 1 << 20


def to_torchscript(model: nn.Module, path: str | os.PathLike[str], *, search_mode: str = "matrix") -> Path:
    """Write `model` as TorchScript, for torch.jit.load in Python and torch::jit::load in C++.

    Its `forward` keeps the optional mask and any leading shape. With ``search_mode="csr"``, for a SearchGraph only, it
    searches list by list, which is faster for batches of hundreds of queries x (nq, d). The file works on the device
    of the index only. Returns the path.
    """
    if search_mode not in ("matrix", "csr"):
        raise ValueError(f"search_mode must be 'matrix' or 'csr', got {search_mode!r}")
    if search_mode == "csr":
        if not isinstance(model, SearchGraph):
            raise ValueError(f"search_mode='csr' is for a SearchGraph, got {type(model).__name__}")
        model = ScriptedLists(model)
    with quietly(), _evaluating(_module(model)):
        _swapped(model, lambda module: replace(Path(path), torch.jit.script(module).save))
    return Path(path)


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """In evaluation mode, every module as it was afterwards."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode


def _swapped(model: nn.Module, use: Callable[[nn.Module], Any]) -> None:
    """Do something that exchanges submodules of `model`, as torch.jit.script does, and put them back."""
    before = {module: dict(module._modules) for module in model.modules() if type(module._modules) is dict}
    try:
        use(model)
    finally:
        for module, held in before.items():
            module._modules.update(held)


def to_exported(
    model: nn.Module,
    path: str | os.PathLike[str],
    *,
    example: Tensor | None = None,
    mask: int | None = None,
    per_query: bool = False,
    exclude: int | None = None,
) -> Path:
    """Write `model` as a program of torch.export, for torch.export.load. Returns the path.

    Parameters
    ----------
    model : a SearchGraph, or a module that contains one or, if the kernel is available, an index.
    path : the file to write.
    example : an input of `model` of at least two rows; not needed for a SearchGraph.
    mask : length n of a second input, a bool mask over ids (n,); None for no such input.
    per_query : whether the mask has a row for each query, (nq, n).
    exclude : columns m of the input ``exclude=`` (nq, m), the ids that each query must not find; by default as in the
        SearchGraph, or none.
    """
    program = _exported(model, example, mask, per_query, exclude)
    replace(Path(path), lambda part: torch.export.save(program, part), ".pt2")
    return Path(path)


def to_aoti(
    model: nn.Module,
    path: str | os.PathLike[str],
    *,
    example: Tensor | None = None,
    mask: int | None = None,
    per_query: bool = False,
    exclude: int | None = None,
) -> Path:
    """Compile `model` by AOTInductor into a package (.pt2) of machine code for this kind of processor.

    torch._inductor.aoti_load_package opens it in Python, AOTIModelPackageLoader in C++. A C++ compiler is needed here,
    but not where the package runs. See `to_exported` for the parameters.
    """
    if Path(path).suffix != ".pt2":
        raise ValueError(f"path must end in .pt2, by which an AOTInductor package is known, got {os.fspath(path)!r}")
    program = _exported(model, example, mask, per_query, exclude)
    replace(Path(path), lambda part: _compile(program, part), ".pt2")
    return Path(path)


def to_onnx(
    model: nn.Module,
    path: str | os.PathLike[str],
    *,
    example: Tensor | None = None,
    mask: int | None = None,
    per_query: bool = False,
    exclude: int | None = None,
    most_bytes: int = _MOST_BYTES,
) -> Path:
    """Write `model` as ONNX (opset 18). Inputs: ``x``, ``mask``, ``exclude``. Outputs of a SearchGraph: ``D``, ``I``.

    If the weights take more than `most_bytes` (at most 1.5e9), they are in a second file ``path.<8 digits>.data`` in
    the same folder, which has to stay there. A runtime copies the candidates of all queries before it multiplies them,
    which takes nq * candidates * d * 4 bytes, so use small batches. Needs the extra `export`. See `to_exported` for the
    other parameters.
    """
    require("onnxscript", "export")
    onnx = require("onnx", "export")
    args, named, shapes = _inputs(model, example, mask, per_query, exclude)
    outputs = ["D", "I"] if isinstance(model, SearchGraph) else None
    with warnings.catch_warnings(), _evaluating(model):
        warnings.simplefilter("ignore")
        program = torch.onnx.export(
            model,
            args,
            kwargs=named,
            dynamo=True,
            dynamic_shapes=shapes,
            input_names=[*["x", "mask"][: len(args)], *named],
            output_names=outputs,
            opset_version=ONNX_OPSET,
            verbose=False,
        )
    assert program is not None
    weights = sum(tensor.nbytes for tensor in {id(t): t for t in [*model.parameters(), *model.buffers()]}.values())
    path = Path(path)
    short = short_name(path.name)
    written = re.compile(re.escape(short) + r"\.[0-9a-f]{8}\.data")
    stale = [file for file in path.parent.iterdir() if written.fullmatch(file.name)]
    # A model names its second file. That one is new each time, and is there before the model that names it.
    name = f"{short}.{secrets.token_hex(4)}"
    with beside(path) as folder:
        part = folder / name
        program.save(part, external_data=weights > most_bytes)
        onnx.checker.check_model(part)
        for data in folder.glob("*.data"):
            os.replace(data, path.with_name(data.name))
        replace(path, lambda temporary: _copy(part, temporary))
    for file in stale:
        file.unlink()
    return path


def _copy(file: Path, to: str) -> None:
    shutil.copyfile(file, to)


def _compile(program: torch.export.ExportedProgram, path: str) -> None:
    from torch._inductor import aoti_compile_and_package

    with quietly():  # torch 2.13 itself uses what it says is deprecated
        warnings.filterwarnings("ignore", message=r".*LeafSpec", category=FutureWarning)
        aoti_compile_and_package(program, package_path=path)


FORMATS: dict[str, Callable[..., Path]] = {
    "torchscript": to_torchscript,
    "exported": to_exported,
    "aoti": to_aoti,
    "onnx": to_onnx,
}


def _exported(
    model: nn.Module, example: Tensor | None, mask: int | None, per_query: bool, exclude: int | None
) -> torch.export.ExportedProgram:
    args, named, shapes = _inputs(model, example, mask, per_query, exclude)
    with torch.no_grad(), _evaluating(model):
        return torch.export.export(model, args, named, dynamic_shapes=shapes)


def _module(model: nn.Module) -> nn.Module:
    """`model`, which is a module."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}; the path is the second argument")
    return model


def _inputs(
    model: nn.Module, example: Tensor | None, mask: int | None, per_query: bool, exclude: int | None
) -> tuple[tuple[Tensor, ...], dict[str, Tensor], tuple[dict[int, Any], ...]]:
    """Inputs to record `model` with, by position and by name, and which of their dimensions may change."""
    if "graph" in _module(model)._modules:
        raise ValueError("model has a submodule called 'graph', a name that torch.export uses itself: call it another")
    if example is None:
        if not isinstance(model, SearchGraph):
            what = f"example is needed to export {type(model).__name__}"
            raise ValueError(f"{what}: pass example=x, an input of at least two rows; only a SearchGraph needs none")
        example = torch.zeros(2, model.d, dtype=torch.float32, device=model.list_ids.device)
    if example.dim() == 0 or example.shape[0] < 2:
        raise ValueError(f"example must have at least two rows, got shape {tuple(example.shape)}")
    batch: dict[int, Any] = {0: torch.export.Dim("batch", min=1, max=_MOST_BATCH)}
    args, named, shapes = [example], {}, [batch]
    if mask is not None:
        rows = example.shape[:1] if per_query else ()
        args.append(torch.ones(*rows, positive(mask, "mask"), dtype=torch.bool, device=example.device))
        shapes.append(batch if per_query else {})
    if exclude is None and isinstance(model, SearchGraph):
        exclude = model.exclude or None
    if exclude is not None:
        size = example.shape[0], positive(exclude, "exclude")
        named["exclude"] = torch.full(size, -1, dtype=torch.int64, device=example.device)
        shapes.append(batch)
    return tuple(args), named, tuple(shapes)


def runner(path: str | os.PathLike[str], format: str) -> Callable[..., tuple[Tensor, ...]]:
    """Open a file that one of the functions above wrote, as a function of tensors that returns tensors.

    An ONNX file is run by onnxruntime on the CPU (extra `export`).
    """
    if format not in FORMATS:
        raise ValueError(f"format must be one of {', '.join(map(repr, FORMATS))}, got {format!r}")
    check_source(Path(path))
    if format == "torchscript":
        with quietly():
            module = torch.jit.load(str(path))
        return lambda *inputs, **named: tuple(module(*inputs, **named))
    if format == "exported":
        with torch.device("cpu"):  # which torch reads tensors by way of, and takes the default for
            program = torch.export.load(str(path)).module()
        return lambda *inputs, **named: tuple(program(*inputs, **named))
    if format == "aoti":
        package = torch._inductor.aoti_load_package(str(path))
        return lambda *inputs, **named: tuple(package(*inputs, **named))
    session = require("onnxruntime", "export").InferenceSession(str(path), providers=["CPUExecutionProvider"])
    names = [value.name for value in session.get_inputs()]

    def run(*inputs: Tensor, **named: Tensor) -> tuple[Tensor, ...]:
        given = {**dict(zip(names, inputs, strict=not named)), **named}
        feeds = {name: given[name].detach().cpu().numpy() for name in names}
        return tuple(torch.from_numpy(array) for array in session.run(None, feeds))

    return run


class Agreement(NamedTuple):
    """How alike two answers are."""

    ids: float  # share of places with the same id, or with a distance equal up to rounding: a tie
    distances: float  # largest difference of distances, relative to what was expected or to 1

    @property
    def good(self) -> bool:
        return self.ids == 1.0 and self.distances < 1e-4


def compare(found: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> Agreement:
    """Compare D and I of two searches of the same queries."""
    D, I = (part.flatten() for part in expected)
    other, ids = (part.flatten() for part in found)
    real = torch.isfinite(D) & torch.isfinite(other)
    apart = torch.where(real, (D - other).abs() / D.abs().clamp(min=1), (D != other).float())
    same = (I == ids) | (real & (apart < 1e-5))
    return Agreement(same.float().mean().item() if len(D) else 1.0, apart.max().item() if len(D) else 0.0)
