"""The process that the memory task starts: build one index, search once, print what that took (bytes)."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from .machine import set_threads

if TYPE_CHECKING:
    import numpy as np

    from .engines import Spec

__all__ = ["measure"]


def measure(job: dict[str, Any]) -> dict[str, Any]:
    from . import rss
    from .cases import CASES
    from .datasets import load
    from .engines import IVF, Spec, make, paired

    case = CASES[job["case"]]
    data = load(case)
    spec = Spec(data.base.shape[1], case.nlist, case.metric, case.seed, job["threads"])
    _warm_up(job["engine"], spec, data.base)
    engine = make([job["engine"]], IVF, spec)[job["engine"]]
    rss.trim()
    before = rss.now()
    paired({job["engine"]: engine}, data.base[: case.train_rows], data.base, data.centroids)
    queries = engine.native(data.queries[: job["nq"]])
    engine.set(1)
    engine.search(queries[:1], 1)  # what an index derives from its rows on first use is made here
    rss.trim()
    index_bytes = rss.now() - before
    engine.set(job["nprobe"])
    growth, answer = rss.growth(lambda: engine.search(queries, case.k))
    return {
        "scratch_bytes": growth,
        "result_bytes": sum(part.nbytes for part in answer),
        "max_bytes": getattr(engine.index, "max_bytes", None),
        "index_bytes": index_bytes,
        "raw_bytes": data.base.nbytes + 8 * len(data.base),
    }


def _warm_up(name: str, spec: Spec, base: np.ndarray) -> None:
    """A small index built, searched and dropped: code and thread pools are there before anything counts."""
    from .engines import IVF, make, paired

    rows = base[:4_096]
    small = make([name], IVF, replace(spec, nlist=min(16, spec.nlist)))[name]
    paired({name: small}, rows, rows, None)
    small.search(small.native(rows[:64]), 5)


if __name__ == "__main__":
    task = json.loads(sys.argv[1])
    set_threads(task["threads"])
    print(json.dumps(measure(task)))
