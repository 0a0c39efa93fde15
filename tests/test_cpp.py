"""The C++ client: built by its two documented commands, it answers as Python does."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from torch_ivf_module import IndexIVFFlat, export, native

ROOT = Path(__file__).parent.parent


pytestmark = pytest.mark.long


@pytest.fixture(scope="module")
def client(tmp_path_factory) -> Path:
    cmake = shutil.which("cmake", path=os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]))
    if cmake is None or shutil.which("c++") is None:
        pytest.skip("needs cmake and a C++ compiler")
    build = tmp_path_factory.mktemp("cpp")
    prefix = torch.utils.cmake_prefix_path
    for command in (
        [cmake, "-S", str(ROOT / "export" / "cpp"), "-B", str(build), f"-DCMAKE_PREFIX_PATH={prefix}"],
        [cmake, "--build", str(build)],
    ):
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return build / "search"


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("format", ["torchscript", "torchscript-csr", "aoti", "aoti-operator"])
def test_the_client_agrees(client, format, tmp_path):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(500, 8, generator=generator)
    index = IndexIVFFlat(8, nlist=5, nprobe=2, k=4)
    index.train(x)
    index.add(x)
    queries = torch.randn(9, 8, generator=generator)
    kernel = []
    if format == "aoti":
        model = export.to_aoti(index.graph(), tmp_path / "model.pt2")
    elif format == "aoti-operator":
        if not native.available():
            pytest.skip("there is no kernel here")
        model = export.to_aoti(nn.Sequential(index), tmp_path / "model.pt2", example=queries[:2])
        kernel = [native.info()["file"]]
    else:
        mode = "csr" if format.endswith("csr") else "matrix"
        model = export.to_torchscript(index.graph(), tmp_path / "model.pt", search_mode=mode)
    queries.numpy().tofile(tmp_path / "queries.f32")
    out = tmp_path / "D.f32", tmp_path / "I.i64"
    done = subprocess.run(
        [str(client), str(model), str(tmp_path / "queries.f32"), "8", *map(str, out), *kernel],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    D = torch.from_numpy(np.fromfile(out[0], np.float32).reshape(9, 4))
    I = torch.from_numpy(np.fromfile(out[1], np.int64).reshape(9, 4))
    assert export.compare((D, I), index.search(queries, 4)).good
    wrong = subprocess.run(
        [str(client), str(model), str(tmp_path / "queries.f32"), "7", *map(str, out), *kernel],
        capture_output=True,
        text=True,
    )
    assert wrong.returncode == 1
    assert "whole rows of 7" in wrong.stderr
