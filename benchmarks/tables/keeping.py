"""What an index takes to build, to change and to hold."""

from __future__ import annotations

from statistics import median

from ..cells import NONE, grid, middle, number, over, speed, times
from ..results import TaskRun

__all__ = ["add", "lists", "maintenance", "memory", "threads", "train"]

_MIB = 2**20


def lists(task: TaskRun) -> str:
    sizes = sorted(task.rows[0]["sizes"])
    shape = [f"{len(sizes):,}", f"{sizes.count(0):,}", f"{sizes[0]:,}", f"{median(sizes):,.0f}", f"{sizes[-1]:,}"]
    head = ["lists", "empty", "shortest", "median", "longest", "imbalance factor"]
    return grid(head, [[*shape, f"{task.rows[0]['imbalance']:.2f}"]])


def train(task: TaskRun) -> str:
    rows = []
    for engine in task.engines():
        seconds, objective = (middle(task.pick(engine=engine), name) for name in ("seconds", "objective"))
        beside = [middle(task.pick(engine="faiss"), name) for name in ("seconds", "objective")]
        ratios = [times(over(seconds, beside[0])), number(over(objective, beside[1]), "{:.4f}")]
        rows.append([engine, number(seconds), ratios[0], number(objective, "{:.5g}"), ratios[1]])
    return grid(["training", "seconds", "time / faiss's", "objective", "objective / faiss's"], rows)


def add(task: TaskRun) -> str:
    rows = []
    for engine in task.engines():
        seconds = middle(task.pick(engine=engine), "seconds")
        ratio = over(seconds, middle(task.pick(engine="faiss"), "seconds"))
        rate = over(float(task.rows[0]["rows"]), seconds)
        rows.append([engine, number(seconds), number(rate, "{:,.0f}"), times(ratio)])
    return grid(["adding", "seconds", "rows/s", "time / faiss's"], rows)


def maintenance(task: TaskRun) -> str:
    rows = []
    for engine in task.engines():
        kinds = ("one add", "batches", "turns", "removes")
        whole, batches, turns, removes = (middle(task.pick(engine=engine, what=kind), "seconds") for kind in kinds)
        theirs = middle(task.pick(engine="faiss", what="turns"), "seconds")
        pairs = task.pick(engine=engine, what="turns")[0]["pairs"]
        per_pair = None if turns is None else turns * 1_000
        rows.append(
            [
                engine,
                number(whole),
                number(batches),
                times(over(batches, whole)),
                f"{pairs:,}",
                number(per_pair),
                times(over(turns, theirs)),
                number(None if removes is None else removes * 1_000),
                times(over(removes, middle(task.pick(engine="faiss", what="removes"), "seconds"))),
            ]
        )
    batch = task.pick(what="batches")[0]["batch"]
    small = f"batches of {batch}, s"
    return grid(
        [
            "maintenance",
            "one add, s",
            small,
            "batches / one",
            "add(1)+search(1) pairs",
            "ms a pair",
            "/ faiss's",
            "ms a small removal",
            "/ faiss's",
        ],
        rows,
    )


def memory(task: TaskRun) -> str:
    rows = []
    for row in task.rows:
        limit = row["max_bytes"]
        rows.append(
            [
                row["engine"],
                f"{row['nq']:,}",
                f"{row['nprobe']}",
                f"{row['scratch_bytes'] / _MIB:,.0f}",
                f"{row['result_bytes'] / _MIB:,.1f}",
                NONE if limit is None else f"{limit / _MIB:,.0f}",
                f"{row['index_bytes'] / row['raw_bytes']:.2f}",
            ]
        )
    return grid(
        ["memory", "nq", "nprobe", "growth, MiB", "results, MiB", "max_bytes, MiB", "index / raw"], rows
    )


def threads(task: TaskRun) -> str:
    rows = [
        [
            f"{row['engine']}, {row['concurrent']} threads",
            f"{row['agreement']:.5f}",
            speed(row["qps_alone"]),
            speed(row["qps"]),
        ]
        for row in task.rows
    ]
    return grid(
        ["concurrent searches", "agreement with one thread", "one thread's queries/s", "together"], rows
    )
