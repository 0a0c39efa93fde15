"""Write the golden files of the current format: python tests/golden/make.py ours|codes|torch-ivf|faiss

An existing folder is not changed. The files of torch-ivf and faiss need these packages.
"""

from __future__ import annotations

import json
import sys
import warnings
from pathlib import Path

import torch
from torch import nn

from torch_ivf_module import (
    IndexFlatIP,
    IndexFlatL2,
    IndexIVFFlat,
    IndexIVFScalarQuantizer,
    IndexPreTransform,
    IndexScalarQuantizer,
)
from torch_ivf_module.checkpoint import VERSION

HERE = Path(__file__).parent
ROWS, D, QUERIES, K = 60, 6, 4, 5


def vectors() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(7)
    return torch.randn(ROWS, D, generator=generator), torch.randn(QUERIES, D, generator=generator)


def expectation(D: torch.Tensor, I: torch.Tensor) -> dict:
    return {"D": torch.as_tensor(D).tolist(), "I": torch.as_tensor(I).tolist()}


def ours(folder: Path) -> dict:
    x, queries = vectors()
    ivf = IndexIVFFlat(D, nlist=5, nprobe=3, k=K, max_codes=50)
    half = IndexIVFFlat(D, nlist=4, nprobe=4, metric="cosine", dtype=torch.float16)
    for index in (ivf, half):
        index.train(x)
        index.add_with_ids(x, torch.arange(ROWS) * 3 + 2**40)
        index.remove_ids(torch.tensor([2**40]))
    flat, rounded, empty = IndexFlatL2(D), IndexFlatIP(D, dtype=torch.bfloat16), IndexIVFFlat(D, nlist=3)
    for index in (flat, rounded):
        index.add(x)
    linear = nn.Linear(D, 3)
    behind = IndexPreTransform(D, linear.requires_grad_(False), IndexFlatL2(3))
    behind.add(x)
    answers = {}
    made = {"ivf": ivf, "cosine-float16": half, "flat": flat, "ip-bfloat16": rounded, "empty": empty, "behind": behind}
    for name, index in made.items():
        index.save(folder / f"{name}.pt")
        index.save(folder / f"{name}.safetensors")
        if index.is_trained:
            answers[name] = expectation(*index.search(queries, K))
    model = nn.Sequential(nn.Linear(D, D), ivf)
    torch.save(model.state_dict(), folder / "model.state_dict.pt")
    return answers


def codes(folder: Path) -> dict:
    x, queries = vectors()
    answers = {}
    for name, index in {
        "ivf-8": IndexIVFScalarQuantizer(D, nlist=5, nprobe=3, k=K, max_codes=50),
        "ivf-4-cosine": IndexIVFScalarQuantizer(D, nlist=4, nprobe=4, metric="cosine", bits=4),
        "flat-8-ip": IndexScalarQuantizer(D, 8, "ip"),
        "flat-4": IndexScalarQuantizer(D, 4),
        "empty": IndexIVFScalarQuantizer(D, nlist=3),
    }.items():
        if name != "empty":
            index.train(x)
            index.add_with_ids(x, torch.arange(ROWS) * 3 + 2**40)
            index.remove_ids(torch.tensor([2**40]))
            answers[name] = expectation(*index.search(queries, K))
        index.save(folder / f"{name}.pt")
        index.save(folder / f"{name}.safetensors")
    return answers


def torch_ivf(folder: Path) -> dict:
    from torch_ivf.index import IndexIVFFlat as Theirs

    x, queries = vectors()
    answers = {}
    for name, settings in {
        "l2": {},
        "ip": {"metric": "ip"},
        "float16": {"dtype": torch.float16},
        "untrained": {},
    }.items():
        index = Theirs(D, nlist=4, nprobe=4, **settings)
        if name != "untrained":
            index.train(x.to(index.dtype), generator=torch.Generator().manual_seed(1))
            index.add(x.to(index.dtype))
            answers[name] = expectation(*index.search(queries.to(index.dtype), K))
        index.save(str(folder / f"{name}.pt"))
    return answers


def faiss(folder: Path) -> dict:
    import faiss

    x, queries = vectors()
    answers = {}
    for name, recipe in {"flat": "Flat", "ivf": "IVF4,Flat", "sq": "IVF4,SQfp16", "pca": "PCA3,Flat"}.items():
        index = faiss.index_factory(D, recipe)
        index.train(x.numpy())
        index.add(x.numpy())
        answers[name] = expectation(*index.search(queries.numpy(), K))
        faiss.write_index(index, str(folder / f"{name}.faiss"))
    return answers


def main() -> None:
    own = {"ours": (ours, f"v{VERSION}"), "codes": (codes, f"codes-v{VERSION}")}
    makers = {**own, "torch-ivf": (torch_ivf, "torch-ivf-0.1.1")}
    make, name = {**makers, "faiss": (faiss, "faiss-1.15.1")}[sys.argv[1]]
    folder = HERE / name
    if folder.exists():
        raise SystemExit(f"{folder} is there already; golden files are never changed")
    folder.mkdir()
    warnings.simplefilter("ignore")
    answers = {"queries": vectors()[1].tolist(), "k": K, "answers": make(folder)}
    (folder / "expected.json").write_text(json.dumps(answers, indent=1) + "\n")


if __name__ == "__main__":
    main()
