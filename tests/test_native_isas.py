"""The instruction sets that the kernel is compiled for: which is taken, and that all give the same answers."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.datasets import normal, problem
from tests.oracle import agree
from tests.problems import DTYPES, shared
from torch_ivf_module import IndexFlatL2, native
from torch_ivf_module.native import compiling

ROOT = Path(__file__).parent.parent
pytestmark = pytest.mark.skipif(not native.available(), reason="no kernel: python -m torch_ivf_module build-native")

# A few searches of each kind; torch.save takes what they found.
SEARCHES = """
import sys, torch
from tests.test_native_isas import searches
from torch_ivf_module import native
torch.save((native.info()["isa"], searches()), sys.argv[1])
"""


def searches():
    """Scores and ids over metrics and dtypes, of many queries and of few, long vectors and short ones."""
    out = []
    for metric in ("l2", "ip", "cosine"):
        for dtype in DTYPES:
            index, _, queries = shared(problem("wide"), metric, dtype, search_mode="auto")
            out += [index.search(queries, 9), index.search(queries[:2], 9)]
    for d, codes in ((3, None), (300, None), (3, 8), (300, 8)):
        index = IndexFlatL2(d, search_mode="auto", codes=codes)
        index.add(normal(700, d, seed=1))
        out += [index.search(normal(40, d, seed=2), 9), index.search(normal(5, d, seed=3), 9)]
    return out


# By what torch says of the CPU, the best first, which may have no name for what multiplies bytes.
BEST_ISAS = {"AVX2": ("avx_vnni", "avx2"), "AVX512": ("avx512_vnni", "avx512")}


def test_the_best_instruction_set_is_taken():
    best = BEST_ISAS.get(torch.backends.cpu.get_cpu_capability(), ("baseline",))
    named = os.environ.get("TORCH_IVF_NATIVE_ISA")
    assert native.info()["isa"] in ((named,) if named else best)


@pytest.mark.parametrize("isa", ["baseline", *compiling.X86_CODES_ISAS])
def test_every_instruction_set_gives_the_same_answers(isa, tmp_path):
    if isa == native.info()["isa"]:
        pytest.skip("the one that all other tests use")
    command = [sys.executable, "-c", SEARCHES, str(tmp_path / "found.pt")]
    variables = {**os.environ, "PYTHONPATH": str(ROOT), "TORCH_IVF_NATIVE_ISA": isa}
    done = subprocess.run(command, env=variables, capture_output=True, text=True, timeout=240)
    if "one that this CPU and this kernel have" in done.stderr:
        pytest.skip("not on this CPU")
    assert done.returncode == 0, done.stderr
    used, found = torch.load(tmp_path / "found.pt")
    assert used == isa
    for one, other in zip(found, searches(), strict=True):
        agree(one, other)
