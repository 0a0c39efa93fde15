"""Workspace of one search, and the size of an index (bytes): each figure in a process of its own."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

from .. import device, rss
from ..cases import CASES
from ..context import Context
from ..datasets import load
from ..engines import IVF, Spec, build_paired, make

_ENGINES = ("ours", "ours-float", "ours-csr", "ours-triton", "faiss")
_ROOT = Path(__file__).resolve().parents[2]
_PROCESS = "import json, sys; from benchmarks.tasks.memory import measure; print(json.dumps(measure(*sys.argv[1:])))"


def memory(ctx: Context) -> None:
    nlist, nprobe, total = ctx.case.nlist, ctx.case.nprobe, len(ctx.data.queries)
    # One query, a large batch, all the queries there are, and every list probed.
    shapes = [(1, nprobe), (min(2_048, total), nprobe), (total, nprobe), (min(512, total), nlist)]
    # On an accelerator its memory is counted, of which faiss-cpu has none.
    for name in (name for name in ctx.names if name in _ENGINES and (device.name == "cpu" or name != "faiss")):
        for nq, probed in dict.fromkeys(shapes):
            where = {"nq": nq, "nprobe": probed}
            ctx.note(f"{name}, nq {nq:,}, nprobe {probed}")
            values = (ctx.case.name, name, ctx.threads, nq, probed, device.name)
            command = [sys.executable, "-c", _PROCESS, *map(str, values)]
            try:
                done = subprocess.run(command, cwd=_ROOT, capture_output=True, text=True, check=True, timeout=300)
                ctx.row(name, **where, k=ctx.case.k, **json.loads(done.stdout.splitlines()[-1]))
            except subprocess.SubprocessError as error:  # it failed, or was not done in time
                ctx.skip(name, str(getattr(error, "stderr", None) or error).strip()[-200:], **where)


def measure(case_name: str, name: str, threads: str, nq: str, nprobe: str, where: str) -> dict[str, Any]:
    """In the new process, which inherits the number of threads: build one index and search once."""
    device.use(where)
    case = CASES[case_name]
    data = load(case)
    spec = Spec(data.base.shape[1], case.nlist, case.metric, case.seed, int(threads), device=where)
    # A small index built and searched first: code is loaded and threads are started before memory is counted.
    rows = data.base[:4_096]
    small = make([name], IVF, replace(spec, nlist=min(16, spec.nlist)))
    build_paired(small, rows, rows, None)
    small[name].search(small[name].convert(rows[:64]), 5)
    del small
    engine = make([name], IVF, spec)[name]
    rss.trim()
    before = rss.now()
    build_paired({name: engine}, data.base[: case.train_rows], data.base, data.centroids)
    queries = engine.convert(data.queries[: int(nq)])
    engine.set(1)
    engine.search(queries[:1], 1)
    engine.warm(engine.convert(data.queries[:64]))  # includes what an index derives from its rows on first use
    rss.trim()
    sizes = {"index_bytes": rss.now() - before, "raw_bytes": data.base.nbytes + 8 * len(data.base)}
    engine.set(int(nprobe))
    growth, answer = rss.growth(engine.search, queries, case.k)
    sizes |= {"scratch_bytes": growth, "result_bytes": sum(part.nbytes for part in answer)}
    return {**sizes, "max_bytes": getattr(engine.index, "max_bytes", None)}
