"""What the project asks of itself, as data. The report sets each line beside what was measured.

A ratio is ours to faiss-cpu in the same run: of queries/s for searches, of time for everything else.
"""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["TARGETS", "Target"]


@dataclass(frozen=True)
class Target:
    task: str
    case: str
    value: float
    at_least: bool  # True: the figure must reach `value`; False: it must not pass it
    what: str  # how the report names the figure
    kind: str | None = None  # the kind of row, for tasks that write several
    nq: int | None = None
    native: bool = False  # asked of the native kernel; else of PyTorch's own operations
    bfloat16: bool | None = None  # only on a processor that has, or has not, units for it


def _searches(case: str, task: str, wanted: dict[int, float], **which: bool) -> list[Target]:
    name = f"native {task}" if which else task
    return [
        Target(task, case, ratio, True, f"{name}, nq {nq:,}: queries/s against faiss", nq=nq, **which)
        for nq, ratio in wanted.items()
    ]


# The kernel's first pass is in bfloat16, with a certificate, where the processor multiplies that in a unit of its own.
_CERTIFIED = {1: 2, 8: 2, 32: 3, 128: 8, 512: 15, 2_048: 25, 19_600: 40}
_FLOAT32 = {1: 1, 8: 1, 32: 1.5, 128: 4, 512: 9, 2_048: 14, 19_600: 18}


TARGETS: tuple[Target, ...] = (
    *_searches("headline", "search", {1: 1, 8: 1, 32: 1, 128: 2, 512: 4, 2_048: 6, 19_600: 7}),
    *_searches("headline", "search", _CERTIFIED, native=True, bfloat16=True),
    *_searches("headline", "search", _FLOAT32, native=True, bfloat16=False),
    *_searches("photographs", "search", {1: 1, 8: 1, 32: 1, 128: 1, 512: 1, 2_048: 4, 19_600: 4}),
    *_searches("headline", "flat", {1: 1, 8: 1, 32: 1, 128: 1, 512: 1, 2_048: 1}),
    *_searches("photographs", "flat", {1: 1, 8: 1, 32: 1, 128: 1, 512: 1, 2_048: 1}),
    Target("train", "headline", 1.0, False, "train: time against faiss"),
    Target(
        "train", "headline", 1.01, False, "train: final k-means objective against faiss", kind="objective"
    ),
    Target("add", "headline", 1.0, False, "add: time against faiss"),
    Target(
        "maintenance",
        "headline",
        2.0,
        False,
        "adding in batches of 256: time against one add",
        kind="batches",
    ),
    Target(
        "maintenance", "headline", 3.0, False, "add(1), search(1) in turn: time against faiss", kind="turns"
    ),
    *(
        Target("budgets", "headline", recall, True, f"{name}: recall against the unlimited search", kind=name)
        for name, recall in {
            "budget 16,384": 0.831,
            "budget 32,768": 0.927,
            "budget 65,536": 0.976,
            "budget 131,072": 0.995,
        }.items()
    ),
    Target("budgets", "headline", 1.0, True, "budgets: queries/s against the next larger budget, the worst"),
    *(
        Target("auto", case, 1.15, False, "auto: worst time against the best fixed mode")
        for case in ("headline", "photographs", "even-lists", "uneven-lists")
    ),
    *(
        Target("memory", case, 1.0, False, "search: worst scratch against max_bytes, results aside")
        for case in ("headline", "photographs", "one-list")
    ),
    *(
        Target("threads", case, 1.0, True, "four threads at once: answers that agree with one thread's")
        for case in ("headline", "photographs", "uneven-lists")
    ),
)
