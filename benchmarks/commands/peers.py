"""What other libraries can do, tried on a small index: the cells of docs/peers.md that begin with yes or no.

A library that is not installed is left out, and a feature that it has no function for is no. Nothing is timed.
"""

import argparse
import importlib
import importlib.metadata
import io
import tempfile
import warnings
from collections.abc import Callable
from contextlib import redirect_stderr
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..engines.peers import PEERS, K, N, Peer, Q, X
from ..tables import grid

PAGE = Path(__file__).resolve().parents[2] / "docs" / "peers.md"
TRUTH = torch.cdist(Q, X).topk(K, largest=False).indices


class Around(nn.Module):
    """A model that searches an index: what is compiled, and exported where the library has no module of its own."""

    def __init__(self, peer: Peer, index: Any) -> None:
        super().__init__()
        self.peer, self.index = peer, index

    def forward(self, x: Tensor) -> Any:
        return self.peer.search(self.index, x * 1)


def _same(ids: Any) -> bool:
    return bool((torch.as_tensor(np.asarray(ids).astype(np.int64)) == TRUTH).all())


def _differentiable(peer: Peer, index: Any) -> bool:
    x = Q.clone().requires_grad_()
    peer.search(index, x)[0].sum().backward()
    return x.grad is not None and bool(x.grad.any())


def _restored(peer: Peer, index: Any) -> bool:
    """An index of fewer rows takes these from a state_dict that was saved and loaded without pickled classes."""
    file, other = io.BytesIO(), peer.make(importlib.import_module(peer.module), X[: N // 2])
    torch.save(index.state_dict(), file)
    file.seek(0)
    other.load_state_dict(torch.load(file, weights_only=True))
    return _same(peer.search(other, Q)[1])


def _exported(peer: Peer, index: Any) -> torch.export.ExportedProgram:
    batch = ({0: torch.export.Dim("batch", min=2)},)
    return torch.export.export(peer.graph(index) if peer.graph else Around(peer, index), (Q,), dynamic_shapes=batch)


def _aoti(peer: Peer, index: Any) -> bool:
    with tempfile.TemporaryDirectory() as folder:
        path = torch._inductor.aoti_compile_and_package(_exported(peer, index), package_path=f"{folder}/a.pt2")
        return _same(torch._inductor.aoti_load_package(path)(Q)[1])


def _mapped(peer: Peer, index: Any) -> bool:
    with tempfile.TemporaryDirectory() as folder:
        return _same(peer.search(peer.map(index, f"{folder}/index"), Q)[1])


def _odd(ids: Any) -> bool:
    return bool((np.asarray(ids) % 2 == 1).all())


FEATURES: dict[str, Callable[[Peer, Any], bool]] = {
    "tensors in and out": lambda peer, index: all(isinstance(part, Tensor) for part in peer.search(index, Q)),
    "a `torch.nn.Module`": lambda peer, index: isinstance(index, nn.Module),
    "restored from a `state_dict`": _restored,
    "gradients to the queries": _differentiable,
    "`torch.compile(fullgraph=True)`": lambda peer, index: _same(
        torch.compile(Around(peer, index), fullgraph=True, backend="eager")(Q)[1]
    ),
    "`torch.export`, any batch size": lambda peer, index: _same(_exported(peer, index).module()(Q)[1]),
    "AOTInductor": _aoti,
    "TorchScript": lambda peer, index: _same(torch.jit.script(peer.graph(index))(Q)[1]),
    "range search": lambda peer, index: len(peer.range(index)) > 0,
    "filter by id": lambda peer, index: _odd(peer.allow(index)),
    "a filter for each query": lambda peer, index: _odd(peer.each(index)),
    "a group for each row": lambda peer, index: _odd(peer.group()),
    "search a file without reading it in": _mapped,
    "remove vectors": lambda peer, index: _odd(peer.remove(index)),  # last: it changes the index
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--why", action="store_true", help="also print why a feature is no")


def run(options: argparse.Namespace) -> int:
    warnings.simplefilter("ignore")
    page, columns, wrong = _page(), {}, []
    for name, peer in PEERS.items():
        try:
            index = peer.make(importlib.import_module(peer.module), X)
        except ImportError as error:
            print(f"left out: {name}, {error}")
            continue
        why = {feature: _try(tried, peer, index) for feature, tried in FEATURES.items()}
        cells = {feature: "no" if reason else "yes" for feature, reason in why.items()}
        columns[f"{name} {importlib.metadata.version(peer.package)}"] = cells.values()
        wrong += [f"{name}, {feature}" for feature in cells if not page[feature, name].startswith(cells[feature])]
        if options.why:
            print(*(f"{name}, {feature}: {reason}" for feature, reason in why.items() if reason), sep="\n")
    print(grid(["", *columns], zip(FEATURES, *columns.values(), strict=True)))
    print(*(f"not so in {PAGE.name}: {cell}" for cell in wrong), sep="\n")
    return 1 if wrong else 0


def _try(feature: Callable[[Peer, Any], bool], peer: Peer, index: Any) -> str:
    """Empty where the library has the feature, else why it does not."""
    try:
        with redirect_stderr(io.StringIO()):  # exports that fail print their graphs
            return "" if feature(peer, index) else "another answer"
    except Exception as error:
        return f"{type(error).__name__}: {str(error).strip().splitlines()[0][:100]}"


def _page() -> dict[tuple[str, str], str]:
    """The cells of the page's table by feature and library, whose release follows its name in the head."""
    lines = [line for line in PAGE.read_text(encoding="utf-8").splitlines() if line.startswith("|")]
    head, _, *rows = [[cell.strip() for cell in line[1:-1].split("|")] for line in lines]
    names = [name.partition(" ")[0] for name in head[1:]]
    return {(row[0], name): cell for row in rows for name, cell in zip(names, row[1:], strict=True)}
