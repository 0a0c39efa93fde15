"""The device that PyTorch's engines search on: whether it is there, waiting for it, its memory, its name."""

import argparse
from typing import Any

name = "cpu"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    help = "of PyTorch's engines, as torch names it: cuda (also for ROCm), xpu (default: cpu)"
    parser.add_argument("--device", default="cpu", help=help)


def use(wanted: str) -> None:
    """Make `wanted` the device of this process; SystemExit if there is no such device."""
    global name
    if wanted != "cpu":
        import torch

        there = torch.accelerator.current_accelerator(check_available=True)
        if there is None or there.type != wanted.partition(":")[0]:
            found = "none" if there is None else f"{there.type!r}"
            raise SystemExit(f"--device {wanted}: the accelerator that torch {torch.__version__} finds is {found}")
    name = wanted


def finish() -> None:
    """Wait until the device has done what it was given. A CPU has."""
    if name != "cpu":
        import torch

        torch.accelerator.synchronize()


def facts() -> dict[str, Any]:
    """What is stored with every figure of a run on an accelerator, beside the facts of its host."""
    if name == "cpu":
        return {}
    import torch

    module = torch.get_device_module(name)
    build = torch.version.cuda or torch.version.hip
    return {"device": name.partition(":")[0], "device_name": module.get_device_name(), "device_build": build}


def kind(facts: dict[str, Any]) -> str:
    """The device of a stored run: "cpu", "cuda", …"""
    return str(facts.get("device", "cpu"))


def images(kind: str) -> str:
    """The folder of the plots of this kind of device, below docs/."""
    return "img" if kind == "cpu" else f"img/{kind}"


def variant(path: Any, kind: str) -> Any:
    """The file for figures of this kind of device: benchmarks.jsonl, benchmarks-cuda.jsonl."""
    return path if kind == "cpu" else path.with_name(f"{path.stem}-{kind}{path.suffix}")
