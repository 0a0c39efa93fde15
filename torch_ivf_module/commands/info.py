"""``info``: what is in a saved index, at a glance.

L lists.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path
from typing import Any

from torch import Tensor

from ..advice import nlist_for, nlist_range
from ..checkpoint import AnyIndex, load
from ..functional.codec import PANEL, panel_bytes
from ..index import IndexIVF, IndexPreTransform
from .common import Reporter, add_json, shown_bytes

__all__ = ["add_arguments", "run"]

_BINS, _BAR = 10, 40
_UNEVEN = 2.0  # imbalance from which reading costs twice what even lists would


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the flags of `info`."""
    parser.add_argument("index", type=Path, help="a saved index: a file of this package, of torch-ivf or of faiss")
    add_json(parser)


def run(args: argparse.Namespace) -> int:
    """Print what the file holds; of its vectors nothing is read."""
    index = load(args.index, mmap=True)
    facts = facts_of(index)
    facts = {"path": str(args.index), "file_bytes": args.index.stat().st_size, **facts}
    Reporter(args).result(facts, _told(facts))
    return 0


def facts_of(index: AnyIndex) -> dict[str, Any]:
    """What there is to know of an index, as JSON can hold it."""
    if isinstance(index, IndexPreTransform):
        steps = [repr(step) for step in index.steps()]
        return {**facts_of(index.index), "class": type(index).__name__, "transform": steps, "d": index.d}
    buffers = {name: buffer.nbytes for name, buffer in index.state_dict().items()}
    facts = {"class": type(index).__name__, **index.config(), "ntotal": index.ntotal, "next_id": int(index.next_id)}
    rows = index.store.packed
    row = rows.shape[1] * rows.element_size()
    facts["bytes_per_vector"] = {"row": row, "code": panel_bytes(index.d) / PANEL}
    facts.update(is_trained=index.is_trained, bytes=buffers, advice=[])
    if isinstance(index, IndexIVF) and index.ntotal:
        facts["lists"] = _list_facts(index)
        facts["advice"] = _advice(index, facts["lists"])
    return facts


def _list_facts(index: IndexIVF) -> dict[str, Any]:
    stats = index.list_stats()
    # Queries that fall as the vectors do fall into long lists more often.
    read = min(index.nprobe, stats.lists) * stats.imbalance * index.ntotal / stats.lists
    facts = {**stats._asdict(), "read_per_query": min(read, float(index.ntotal))}
    return {**facts, "histogram": _histogram(index.list_sizes())}


def _histogram(sizes: Tensor) -> list[dict[str, int]]:
    """Lists by their length, in bins of one round width."""
    longest = int(sizes.max())
    width = math.ceil((longest + 1) / _BINS)
    power = 10 ** max(0, len(str(width)) - 2)
    width = math.ceil(width / power) * power
    counts = (sizes // width).bincount().tolist()
    return [{"from": n * width, "to": (n + 1) * width - 1, "lists": count} for n, count in enumerate(counts)]


def _advice(index: IndexIVF, lists: dict[str, Any]) -> list[str]:
    """What someone who knows such indexes would say."""
    rows, nlist = index.ntotal, lists["lists"]
    fewest, most = nlist_range(rows)
    verdict = "suits" if fewest <= nlist <= most else "is few for" if nlist < fewest else "is many for"
    usual = f"{fewest:,} to {most:,} are usual, {nlist_for(rows):,} (4 * sqrt(N)) is a good start"
    advice = [f"nlist {nlist:,} {verdict} {rows:,} vectors: {usual}"]
    if lists["imbalance"] >= _UNEVEN:
        advice.append(
            f"imbalance {lists['imbalance']:.1f}: a search reads so many times what even lists would cost; "
            "train on rows like those that are stored, or with more lists"
        )
    share = lists["read_per_query"] / rows
    advice.append(
        f"nprobe {index.nprobe} reads {share:.1%} of the vectors; more of it finds more of the true neighbours"
    )
    return advice


def _told(facts: dict[str, Any]) -> str:
    """The facts for a person."""
    size = facts["bytes"]
    parts = [f"{name.split('_')[-1]} {shown_bytes(count)}" for name, count in size.items() if count > 8]
    kind = f"{facts['class']}, metric {facts['metric']}"
    rows = [
        ("index", f"{facts['path']} ({shown_bytes(facts['file_bytes'])}): {kind}"),
        ("vectors", f"{facts['ntotal']:,} of {facts['d']}, {_stored_as(facts)}; the next id is {facts['next_id']:,}"),
        ("memory", f"{shown_bytes(sum(size.values()))}: {', '.join(parts) or 'empty'}"),
        ("memory", _told_bytes(facts)),
    ]
    if "transform" in facts:
        rows.insert(2, ("before", " -> ".join(facts["transform"])))
    if not facts["is_trained"]:
        rows.append(("lists", f"{facts['nlist']:,}, not trained yet"))
    if "lists" in facts:
        rows += _told_lists(facts)
    rows += [("advice", line) for line in facts["advice"]]
    names = [name for name, _ in rows]
    shown = ["" if name == before else name for name, before in zip(names, ["", *names], strict=False)]
    return "\n".join(f"{name:<9}{text}" for name, (_, text) in zip(shown, rows, strict=True))


def _stored_as(facts: dict[str, Any]) -> str:
    return facts["dtype"] if "dtype" in facts else f"codes of {facts['bits']} bits"


def _told_bytes(facts: dict[str, Any]) -> str:
    each, codes = facts["bytes_per_vector"], facts["codes"]
    made = codes == 8 or (codes == "auto" and "dtype" in facts)  # of rows that are codes themselves only if asked to
    code = f"; its 8-bit copy {each['code']:,.0f} more, not in the file (codes={codes!r})" if made else ""
    return f"a vector {each['row']:,} bytes, its id 8{code}"


def _told_lists(facts: dict[str, Any]) -> list[tuple[str, str]]:
    lists = facts["lists"]
    cap = f", at most {facts['max_codes']:,} vectors" if facts["max_codes"] else ""
    read = f"about {lists['read_per_query']:,.0f} vectors"
    rows = [
        ("lists", f"{lists['lists']:,}, {lists['empty']:,} empty; nprobe {facts['nprobe']}: {read} a query{cap}"),
        ("length", f"{lists['min']:,} to {lists['max']:,}, median {lists['median']:,.0f}"),
        ("length", f"imbalance factor {lists['imbalance']:.2f} (1 is even)"),
    ]
    tallest = max(part["lists"] for part in lists["histogram"])
    for part in lists["histogram"]:
        bar = "█" * math.ceil(_BAR * part["lists"] / tallest)
        rows.append(("length", f"{part['from']:>9,} – {part['to']:<9,} {part['lists']:>7,} {bar}"))
    return rows
