"""MaxSimGraph: the search of a MaxSim as a module of static shapes, for torch.compile and for export.

Q queries, T tokens per query, d dim, K rows per token, C candidates, M documents, W rows of the longest one.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .functional import maxsim
from .functional import metric as metrics
from .functional.maxsim import Documents
from .functional.row_codes import Rows
from .functional.select import select_topk
from .graph import SearchGraph
from .index import validation


class MaxSimGraph(nn.Module):
    """The search of a `MaxSim` with constant settings and a constant number of tokens; made by ``searcher.graph()``.

    The number of tokens T, `k`, `candidates` and the constants of a `SearchGraph` are constant. Every query scores
    `candidates` documents, each as if it had as many rows as the longest document. If there are at least as many
    candidates as documents, the result is exact. Otherwise documents may be missed, even if all lists are probed.

    >>> from torch_ivf_module import IndexFlatIP, MaxSim
    >>> index = IndexFlatIP(2)
    >>> index.add_with_ids(torch.eye(2), torch.tensor([5, 9]))
    >>> MaxSim(index).graph(tokens=1, k=1)(torch.tensor([[[0.0, 2.0]]]))
    (tensor([[2.]]), tensor([[9]]))
    """

    document_ids: Tensor

    def __init__(self, search: SearchGraph, documents: Documents, *, tokens: int, k: int, candidates: int) -> None:
        super().__init__()
        self.tokens, self.k = tokens, k
        self.candidates = min(candidates, documents.ids.shape[0])
        self.width = int(documents.sizes.max()) if self.candidates else 0
        for name, tensor in documents._asdict().items():
            self.register_buffer(f"document_{name}", tensor, persistent=False)
        # The rows of the inner graph are called by the numbers of their documents.
        search.list_ids = maxsim.numbers_of(documents, search.list_ids)
        self.search = search

    def documents(self) -> Documents:
        """The documents that are searched."""
        return Documents(*(getattr(self, f"document_{name}") for name in Documents._fields))

    def forward(self, queries: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """D and the ids of documents, both (Q, k), for queries (Q, T, d), as `MaxSim.search` gives them.

        `mask` (Q, T) bool is false for padding tokens.
        """
        self.search.check_current()
        queries = validation.floats(queries, "queries", self.document_ids.device)
        if queries.dim() != 3 or queries.shape[1:] != (self.tokens, self.search.d):
            shape = tuple(queries.shape)
            raise ValueError(f"queries must have shape (n, {self.tokens}, {self.search.d}), got {shape}")
        with torch.autocast(queries.device.type, enabled=False):
            return self._search(queries.float(), mask)

    def _search(self, queries: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
        if not self.candidates:
            none = torch.full((queries.shape[0], self.k), -1, device=queries.device)
            return none.float() * torch.inf, none
        documents, packed = self.documents(), self.search.lists().packed
        tokens, weights, usable = maxsim_input(queries, mask, self.search.metric)
        with torch.no_grad():
            plain = tokens.detach()
            scores, numbers = self.search.rows(plain.flatten(0, 1))
            shape = (-1, self.tokens, self.search.k)
            ranking = maxsim.estimates(numbers.view(shape), scores.view(shape), weights, documents.ids.shape[0])
            numbers = torch.topk(ranking, self.candidates, dim=1).indices
            scores, rows = maxsim.score_documents(plain, weights, packed, documents, numbers, self.width)
            at = torch.arange(self.candidates, device=rows.device).expand_as(scores)
            at = select_topk(scores, at, self.k)[1]
            found = at.clamp(min=0)
            numbers = numbers.gather(1, found).masked_fill((at < 0) | ~usable, -1)
            rows = rows.gather(1, found[..., None].expand(-1, -1, self.tokens))
        return maxsim_answer(tokens, weights, packed, documents, numbers, rows)

    def extra_repr(self) -> str:
        return f"tokens={self.tokens}, k={self.k}, candidates={self.candidates}, width={self.width}"


def maxsim_input(queries: Tensor, mask: Tensor | None, metric: str) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens (Q, T, d) as the metric compares them, 0 for padding, their weights (Q, T), and which queries are usable.

    A query is usable (Q, 1) if it has a token and all its tokens are finite.
    """
    real = torch.ones(queries.shape[:2], dtype=torch.bool, device=queries.device) if mask is None else mask
    finite = (queries.detach().isfinite().all(2) | ~real).all(1, keepdim=True)
    usable = finite & real.any(1, keepdim=True)
    tokens = metrics.prepare(queries.masked_fill(~(real & usable)[..., None], 0), metric)
    return tokens, (real & usable).float(), usable


def maxsim_answer(
    tokens: Tensor, weights: Tensor, packed: Rows, documents: Documents, numbers: Tensor, rows: Tensor
) -> tuple[Tensor, Tensor]:
    """D (Q, k), differentiable in tokens (Q, T, d), and document ids (Q, k) of documents by number (Q, k), -1 for none,
    whose best rows are `rows` (Q, k, T). Sorted again, since the scores may be rounded otherwise than before."""
    scores = maxsim.differentiable_scores(tokens, weights, packed, rows)
    scores, numbers = select_topk(scores, numbers, numbers.shape[1])
    return scores, documents.ids[numbers.clamp(min=0)].masked_fill(numbers < 0, -1)
