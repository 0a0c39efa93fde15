"""Indexes in data-parallel models, in real processes."""

from __future__ import annotations

import subprocess
import sys

import pytest

from tests import jobs, processes


@pytest.mark.parametrize("job", [jobs.checked_with_different_rows, jobs.growing_apart_after_wrapping])
def test_ranks_with_different_rows_are_told_of_it(job):
    assert processes.run(job, 2) == [0, 0]


def test_importing_the_package_registers_no_hook():
    code = """
        import torch
        from torch.nn.modules import module
        names = [name for name in dir(module) if name.startswith("_global_") and name.endswith(("hooks", "kwargs"))]
        before = {name: len(getattr(module, name)) for name in names}
        import torch_ivf_module
        assert names
        assert before == {name: len(getattr(module, name)) for name in names}
    """
    subprocess.run([sys.executable, "-c", "\n".join(line[8:] for line in code.splitlines())], check=True)
