"""TorchScript: whatever is written for its sake is written here.

TorchScript is deprecated upstream and understands a part of Python only. So the search is not written for it but
recorded (torch.jit.trace), and what a recording cannot hold - shapes to restore, an optional mask, a loop over
lists - is scripted around it. Annotations are spelled as it reads them; this file has no `from __future__`.
"""

import warnings
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Iterator, List, Optional, Tuple  # noqa: UP035

import torch
from torch import Tensor, nn

from .functional import metric as metrics
from .functional.block_maxima import BLOCK, GROUP, PRODUCT_SCORES, SECTION, SPAN, blocks_of, tasks_of
from .functional.lists import ids_at
from .functional.probe import probe_by_ranking
from .functional.rescore import rescore
from .functional.row_codes import SplitRows, decoded
from .functional.scan_lists import BLOCK_BYTES, selected_at_a_time, survivors
from .functional.scan_queries import best_rows
from .functional.search import candidate_count, capped_lists, finite_queries, shifted_queries

if TYPE_CHECKING:
    from .graph import SearchGraph


class ScriptedSearch(nn.Module):
    """What torch.jit.script takes for a SearchGraph, with its `forward`."""

    def __init__(self, graph: "SearchGraph") -> None:
        super().__init__()
        graph.check_current()
        self.d, self.k, self.exclude = graph.d, graph.k, graph.exclude
        self.search = _record(_Search(graph), graph, "plain", "masked", "masked_each")

    def forward(
        self,
        x: Tensor,
        mask: Optional[Tensor] = None,  # noqa: UP045
        exclude: Optional[Tensor] = None,  # noqa: UP045
    ) -> Tuple[Tensor, Tensor]:  # noqa: UP006
        shape = list(x.shape)
        if len(shape) == 0 or shape[-1] != self.d:
            raise ValueError("x must have shape (..., {}), got {}".format(self.d, shape))  # noqa: UP032
        rows = x.reshape(-1, self.d)
        excluded = torch.full([rows.shape[0], 0], -1, dtype=torch.int64, device=x.device)
        if exclude is not None:
            excluded = exclude.reshape([rows.shape[0], -1])
        if excluded.shape[1] != self.exclude:
            raise ValueError("exclude must have {} columns, got {}".format(self.exclude, excluded.shape[1]))  # noqa: UP032
        if mask is None:
            found, ids = self.search.plain(rows, excluded)
        elif mask.dim() == 1:
            found, ids = self.search.masked(rows, excluded, mask)
        else:
            found, ids = self.search.masked_each(rows, excluded, mask.reshape([rows.shape[0], -1]))
        return found.view(shape[:-1] + [self.k]), ids.view(shape[:-1] + [self.k])  # noqa: RUF005


class _Search(nn.Module):
    def __init__(self, graph: "SearchGraph") -> None:
        super().__init__()
        self.graph = graph

    def plain(self, x: Tensor, exclude: Tensor) -> Tuple[Tensor, Tensor]:  # noqa: UP006
        return self.graph.rows(x, None, exclude if self.graph.exclude else None)

    def masked(self, x: Tensor, exclude: Tensor, mask: Tensor) -> Tuple[Tensor, Tensor]:  # noqa: UP006
        return self.graph.rows(x, mask, exclude if self.graph.exclude else None)

    def masked_each(self, x: Tensor, exclude: Tensor, mask: Tensor) -> Tuple[Tensor, Tensor]:  # noqa: UP006
        return self.masked(x, exclude, mask)


class ScriptedLists(nn.Module):
    """The list-major search of a SearchGraph for torch.jit.script: for large batches, x (Q, d) only.

    As in functional/block_maxima.py, each list is multiplied once with the queries that visit it.
    """

    packed: Tensor
    ranges: Tensor
    bias: Tensor

    def __init__(self, graph: "SearchGraph") -> None:
        super().__init__()
        graph.check_current()
        if graph.exclude:
            raise ValueError("search_mode='csr' does not support exclude: use search_mode='matrix'")
        lists = graph.lists()
        self.d = graph.d
        self.width = int(torch.sort(blocks_of(lists.sizes), descending=True).values[: graph.nprobe].sum())
        # Maxima of a batch are held at a time, so a batch is cut where they may reach max_bytes.
        self.batch = max(1, graph.max_bytes // (BLOCK_BYTES * max(1, self.width)))
        self.selected = selected_at_a_time(self.width, candidate_count(graph.k))
        self.group, self.block, self.span, self.section, self.product = GROUP, BLOCK, SPAN, SECTION, PRODUCT_SCORES
        packed: Any = lists.packed
        ranges = torch.empty(0, 2, dtype=torch.float32, device=lists.bias.device)
        self.coded = isinstance(packed, SplitRows)
        if isinstance(packed, SplitRows):
            packed, ranges = packed
        self.register_buffer("packed", packed, persistent=False)
        self.register_buffer("ranges", ranges, persistent=False)
        self.register_buffer("bias", lists.bias, persistent=False)
        self.offsets: List[int] = lists.offsets.tolist()  # noqa: UP006
        self.begin = _record(_Begin(graph), graph, "forward")
        self.finish = _record_finish(_Finish(graph, self.width), graph, self.begin)

    def forward(self, x: Tensor) -> Tuple[Tensor, Tensor]:  # noqa: UP006
        if x.dim() != 2 or x.shape[1] != self.d:
            raise ValueError("x must have shape (n, {}), got {}".format(self.d, list(x.shape)))  # noqa: UP032
        distances: List[Tensor] = []  # noqa: UP006
        ids: List[Tensor] = []  # noqa: UP006
        for batch in x.split(self.batch):
            prepared, shifted, probed, queries, visits, before, rank = self.begin(batch)
            fine = self.maxima(shifted, queries, visits, before)
            coarse = fine.amax(1)
            for start in range(0, max(1, batch.shape[0]), self.selected):
                end = min(start + self.selected, batch.shape[0])
                found, names = self.finish(
                    prepared[start:end], shifted[start:end], probed[start:end], rank[start:end], before, coarse, fine
                )
                distances.append(found)
                ids.append(names)
        return torch.cat(distances), torch.cat(ids)

    def maxima(self, x: Tensor, queries: Tensor, visits: Tensor, before: Tensor) -> Tensor:
        counts: List[int] = visits.tolist()  # noqa: UP006
        starts: List[int] = before.tolist()  # noqa: UP006
        total = 0
        for number in range(len(self.offsets) - 1):
            size = self.offsets[number + 1] - self.offsets[number]
            total += counts[number] * ((size + self.span - 1) // self.span)
        fine = torch.full([max(1, total), self.block], float("-inf"), dtype=torch.float32, device=x.device)
        scratch = torch.empty([0], dtype=torch.float32, device=x.device)
        first = 0
        for number in range(len(self.offsets) - 1):
            count, begin = counts[number], self.offsets[number]
            size = self.offsets[number + 1] - begin
            blocks = (size + self.span - 1) // self.span
            held = fine[starts[number] : starts[number] + count * blocks].view(count, blocks * self.block)
            for row in range(0, size if count > 0 else 0, self.section):
                rows = min(self.section, size - row)
                groups = (rows + self.group - 1) // self.group
                section = self.packed[begin + row : begin + row + rows]
                if self.coded:
                    section = decoded(section, self.ranges[begin + row : begin + row + rows], self.d)
                vectors = section.float().t()
                step = max(1, self.product // (groups * self.group))
                for task in range(0, count, step):
                    some = min(step, count - task)
                    if scratch.numel() < some * groups * self.group:
                        scratch = torch.empty([some * groups * self.group], dtype=torch.float32, device=x.device)
                    scores = scratch[: some * groups * self.group].view(some, groups * self.group)
                    scores[:, rows:] = float("-inf")
                    part = x.index_select(0, queries[first + task : first + task + some])
                    if self.bias.numel() > 0:
                        torch.addmm(self.bias[begin + row : begin + row + rows], part, vectors, out=scores[:, :rows])
                    else:
                        torch.mm(part, vectors, out=scores[:, :rows])
                    scores.nan_to_num_(float("-inf"), float("-inf"), float("-inf"))
                    at = row // self.group
                    held[task : task + some, at : at + groups] = scores.view(some, self.group, groups).amax(1)
            first += count
        return fine


class _Begin(nn.Module):
    """What comes before the loop: the tasks of each list."""

    def __init__(self, graph: "SearchGraph") -> None:
        super().__init__()
        self.graph = graph

    def forward(self, x: Tensor) -> Tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # noqa: UP006
        graph, lists = self.graph, self.graph.lists()
        prepared = metrics.prepare(x.float(), graph.metric)
        coarse = graph.coarse()
        queries, finite = finite_queries(prepared.detach())
        nearest = probe_by_ranking(queries, coarse, graph.nprobe, graph.metric)
        probed, _ = capped_lists(nearest, finite, coarse, [lists], graph.max_codes)
        shifted = shifted_queries(queries, coarse.origin, graph.metric)
        tasks = tasks_of(shifted, lists, probed)
        return prepared, shifted, probed, tasks.queries, tasks.visits, tasks.before, tasks.rank


class _Finish(nn.Module):
    """What comes behind it: from maxima to D and I."""

    def __init__(self, graph: "SearchGraph", width: int) -> None:
        super().__init__()
        self.graph, self.width = graph, width

    def forward(
        self, x: Tensor, shifted: Tensor, probed: Tensor, rank: Tensor, before: Tensor, coarse: Tensor, fine: Tensor
    ) -> Tuple[Tensor, Tensor]:  # noqa: UP006
        graph, lists = self.graph, self.graph.lists()
        kept = candidate_count(graph.k)
        first = before[probed] + rank * blocks_of(lists.sizes)[probed]
        rows, _ = survivors(lists, probed, first, (coarse, fine), kept, self.width)
        rows = best_rows(shifted, lists, rows, kept)[1]
        scores, rows = rescore(x, lists.packed, rows, graph.k, graph.metric, metrics.differentiable_scores)
        return metrics.to_distance(scores, graph.metric), ids_at([lists.ids], rows)


@contextmanager
def quietly() -> Iterator[None]:
    """Without the notice that TorchScript is deprecated, and a tracer's that shapes of buffers are constants."""
    with warnings.catch_warnings():
        for category in (DeprecationWarning, FutureWarning):  # torch 2.13 and 2.14
            warnings.filterwarnings("ignore", message=r".*torch\.jit\.\w+. is deprecated", category=category)
        warnings.filterwarnings(
            "ignore",
            category=torch.jit.TracerWarning,  # type: ignore[attr-defined]
        )
        yield


def _record(module: nn.Module, graph: "SearchGraph", *methods: str) -> Any:
    x = torch.zeros(2, graph.d, dtype=torch.float32, device=graph.list_ids.device)
    mask = torch.ones(2, 1, dtype=torch.bool, device=x.device)
    exclude = torch.full((2, graph.exclude), -1, dtype=torch.int64, device=x.device)
    filters = {"plain": (exclude,), "masked": (exclude, mask[0]), "masked_each": (exclude, mask), "forward": ()}
    inputs = {name: (x, *filters[name]) for name in methods}
    with quietly(), torch.inference_mode(False):
        return torch.jit.trace_module(module, inputs, check_trace=False)


def _record_finish(module: nn.Module, graph: "SearchGraph", begin: Any) -> Any:
    x = torch.zeros(2, graph.d, dtype=torch.float32, device=graph.list_ids.device)
    prepared, shifted, probed, _, visits, before, rank = begin(x)
    blocks = blocks_of(graph.lists().sizes)
    fine = torch.zeros(max(1, int((visits * blocks).sum())), BLOCK, dtype=torch.float32, device=prepared.device)
    with quietly(), torch.inference_mode(False):
        return torch.jit.trace(
            module, (prepared, shifted, probed, rank, before, fine.amax(1), fine), check_trace=False
        )
