"""Runs tests of other libraries on faiss_compat and on the adaptors of `torch_ivf_module.integrations`, each in an
environment of its own, in which faiss is not installed.

    python integrations/run.py                        all but faiss's own tests
    python integrations/run.py datasets langchain     some
    python integrations/run.py --faiss-checkout DIR   faiss's own Python tests too

PyTorch is installed once; the environments of the libraries find it there, but for anomalib's. `--environments` says
where they are made.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
# After a change of one of these an environment is filled anew.
SETTLED = ("pyproject.toml", "constraints.txt", "integrations/releases.txt")
# What an adaptor needs comes with its extra alone, and an example that writes an ONNX file needs `export`.
EXTRAS = {
    "pytorch_metric_learning": "pytorch-metric-learning",
    "langchain": "langchain",
    "sentence_transformers": "sentence-transformers",
    "torch_geometric": "torch-geometric",
    "lightning": "lightning",
    "anomalib": "anomalib,export",
}
# What the tests need beside that; releases.txt has the releases that they were last seen to pass with.
PACKAGES = {
    "datasets": ["datasets", "pytest"],
    "pytorch_metric_learning": ["pytest"],
    "langchain": ["langchain-community", "langchain-tests", "pytest", "pytest-asyncio"],
    "sentence_transformers": ["datasets", "pytest"],
    "torch_geometric": ["pytest"],
    "lightning": ["scikit-learn", "pytest"],
    # With the PyTorch that this torchvision is built for, in a build for GPUs.
    "anomalib": ["torch==2.14.1", "torchvision==0.29.1", "pytest"],
    "faiss": ["pytest", "scipy"],
}


def environment(folder: Path, packages: list[str], base: Path | None, extras: str = "") -> Path:
    """The interpreter of an environment in `folder` with some packages, and those of the environment `base`.

    With `extras` this package is among them, with these extras. PyTorch is the release of constraints.txt unless the
    packages name one.
    """
    python = folder / "bin" / "python"
    ready = folder / ".ready"
    wanted = "\n".join([*packages, extras, *((ROOT / name).read_text() for name in SETTLED)])
    if ready.exists() and ready.read_text() == wanted:
        return python
    subprocess.run([sys.executable, "-m", "venv", folder], check=True)
    if base is not None:
        found = next(base.glob("lib/python*/site-packages"))
        (next(folder.glob("lib/python*/site-packages")) / "base.pth").write_text(f"{found}\n")
    pip = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-compile"]
    pins = ["-c", HERE / "releases.txt", *([] if _own_torch(packages) else ["-c", ROOT / "constraints.txt"])]
    this = ["--editable", f"{ROOT}[{extras}]"] if extras else []
    subprocess.run([*pip, *pins, *this, *packages], check=True, env={**os.environ, "TORCH_IVF_NATIVE": "0"})
    ready.write_text(wanted)
    return python


def _own_torch(packages: list[str]) -> bool:
    return any(package.startswith("torch==") for package in packages)


def run(name: str, folder: Path, checkout: Path | None) -> bool:
    """Whether the tests of one library pass."""
    base = None if _own_torch(PACKAGES[name]) else folder / "torch"
    if base is not None:
        environment(base, ["torch", "numpy"], None)
    python = environment(folder / name, PACKAGES[name], base, EXTRAS.get(name, ""))
    settings = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    pytest = [python, "-m", "pytest", "-W", "ignore", "-c", HERE / "pytest.ini", HERE / f"use_{name}.py"]
    command = [python, HERE / "faiss_tests.py", str(checkout)] if name == "faiss" else pytest
    began = time.monotonic()
    passed = subprocess.run(command, env=settings, cwd=ROOT, check=False).returncode == 0
    print(f"== {name} {'passed' if passed else 'FAILED'} in {time.monotonic() - began:.0f} s", flush=True)
    return passed


def main() -> int:
    """Run what the command line asks for; 1 if anything fails."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(PACKAGES)}")
    parser.add_argument("--faiss-checkout", type=Path, metavar="DIR")
    parser.add_argument("--environments", type=Path, default=ROOT / ".venv-integrations", metavar="DIR")
    given = parser.parse_args()
    if unknown := set(given.names) - set(PACKAGES):
        parser.error(f"no such library: {', '.join(sorted(unknown))}; there are {', '.join(PACKAGES)}")
    names = given.names or [name for name in PACKAGES if name != "faiss" or given.faiss_checkout]
    if "faiss" in names and not given.faiss_checkout:
        parser.error("faiss's own tests need --faiss-checkout DIR, a checkout of facebookresearch/faiss")
    if "faiss" not in names:
        print("== faiss's own tests are left out: they need ARGS='--faiss-checkout DIR'")
    results = [run(name, given.environments.resolve(), given.faiss_checkout) for name in names]
    return 0 if all(results) else 1


if __name__ == "__main__":
    sys.exit(main())
