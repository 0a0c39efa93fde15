"""Where and with what a run was made: processor, threads, versions, commit, command. The command `env` prints it."""

import argparse
import importlib.metadata
import json
import os
import platform
import re
import subprocess
from contextlib import suppress
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from . import device

_PACKAGES = "torch-ivf-module torch numpy faiss-cpu torch-ivf hnswlib scann-core-torch"
_SIMD = re.compile(r"^(sse4|avx|amx|fma|f16c|asimd|sve|bf16|i8mm|neon)")
_ROOT = Path(__file__).resolve().parents[1]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    default, help = os.environ.get("OMP_NUM_THREADS", "2"), "of every library (default: OMP_NUM_THREADS, or else 2)"
    parser.add_argument("--threads", type=int, default=default, help=help)


def run(options: argparse.Namespace) -> int:
    set_threads(options.threads)
    print(json.dumps(describe(options.threads, f"env --threads {options.threads}"), indent=2))
    return 0


def set_threads(threads: int) -> None:
    """The same number of threads for every library; called before they are first imported."""
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "SCANN_NUM_THREADS"):
        os.environ[name] = str(threads)
    import torch

    torch.set_num_threads(threads)


def describe(threads: int, command: str) -> dict[str, Any]:
    """The facts that are stored with every figure of a run."""
    import torch

    versions = {}
    for package in _PACKAGES.split() + ["triton"] * (device.name != "cpu"):
        with suppress(importlib.metadata.PackageNotFoundError):
            versions[package] = importlib.metadata.version(package)
    return {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "command": f"python -m benchmarks {command}",
        "commit": commit(),
        "changed": bool(_git("status", "--porcelain", "--", "torch_ivf_module", "benchmarks/*.py")),
        "threads": threads,
        **device.facts(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "cpu": _cpu_model(),
        "simd": simd(),
        "torch_capability": torch.backends.cpu.get_cpu_capability(),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "load": os.getloadavg()[0],
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        "versions": versions,
    }


def commit() -> str:
    return _git("rev-parse", "HEAD") or "none"


def _git(*arguments: str) -> str:
    with suppress(FileNotFoundError, subprocess.CalledProcessError):
        command = ["git", "-C", str(_ROOT), *arguments]
        return subprocess.check_output(command, text=True, stderr=subprocess.DEVNULL).strip()
    return ""


def _cpuinfo(field: str) -> str:
    path = Path("/proc/cpuinfo")
    found = re.search(rf"^{field}\s*:(.*)$", path.read_text() if path.exists() else "", re.MULTILINE)
    return found[1].strip() if found else ""


def _cpu_model() -> str:
    name = _cpuinfo("model name") or platform.processor() or platform.machine()
    family, model, stepping = (_cpuinfo(field) for field in ("cpu family", "model", "stepping"))
    return f"{name} (family {family}, model {model}, stepping {stepping})" if family and model and stepping else name


def simd() -> list[str]:
    """The vector and matrix units that the processor names."""
    return [flag for flag in (_cpuinfo("flags") or _cpuinfo("Features")).split() if _SIMD.match(flag)]
