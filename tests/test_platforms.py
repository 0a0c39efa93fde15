"""What can be checked here of other systems: files and searches without the modules and functions of POSIX, and without
encodings that depend on the locale. test_training.py has a process that is spawned."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
# Other packages keep the system that they were imported on.
OTHER_SYSTEM = """
import os, sys, tempfile, warnings
from pathlib import Path
import filelock, numpy, torch

for name in ("fcntl", "grp", "posix", "pwd", "resource", "syslog", "termios"):
    sys.modules[name] = None
for name in ("fork", "getuid", "geteuid", "getpgid", "register_at_fork", "sched_getaffinity", "O_NOFOLLOW"):
    if hasattr(os, name):
        delattr(os, name)
os.name = "other"
warnings.simplefilter("error", EncodingWarning)

from torch_ivf_module import IndexIVFFlat, build_file, cli, load, native

x = torch.randn(300, 8, generator=torch.Generator().manual_seed(0))
index = IndexIVFFlat(8, nlist=4, nprobe=4).fit(x)
index.add(x)
with tempfile.TemporaryDirectory() as folder:
    path = Path(folder, "index.pt")
    for _ in range(2):
        index.save(path)
    for mmap in (False, True):
        assert torch.equal(load(path, mmap=mmap).search(x[:5], 3)[1], index.search(x[:5], 3)[1])
    numpy.save(path.with_name("vectors.npy"), x.numpy())
    build_file(path.with_name("vectors.npy"), path.with_name("built.pt"), IndexIVFFlat(8, nlist=4))
    assert cli.main(["info", str(path.with_name("built.pt")), "--json"]) == 0
    assert not [name for name in os.listdir(folder) if name.endswith(".part")]
"""


def test_files_and_searches_need_nothing_of_posix(tmp_path: Path) -> None:
    command = [sys.executable, "-X", "warn_default_encoding", "-W", "ignore", "-c", OTHER_SYSTEM]
    surroundings = os.environ | {"PYTHONPATH": str(ROOT), "TORCH_IVF_NATIVE": "0"}
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path, env=surroundings)
    assert done.returncode == 0, done.stderr
