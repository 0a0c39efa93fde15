"""MaxSim: search among documents of several vectors each, by late interaction, as a torch.nn.Module.

Q queries, T tokens per query, d dim, K rows per token, C candidates, M documents, N rows.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .functional import maxsim
from .functional.lists import is_selected
from .functional.maxsim import Documents
from .functional.select import select_topk
from .functional.transforms import refuse_transform
from .graph import SearchGraph
from .index import validation
from .index.base import IndexBase
from .index.eager import opaque, refuse_recording, without_autocast
from .index.grouping import refuse as refuse_groups
from .index.integrity import VersionToken
from .maxsim_graph import MaxSimGraph, maxsim_answer, maxsim_input
from .params import SearchParams, positive


class MaxSim(nn.Module):
    """Search for documents that are sets of vectors, with queries that are sets of vectors (ColBERT, arXiv:2004.12832).

    The score of a document is the sum, over the tokens of the query, of the maximum product (metric "ip", or "cosine")
    with a vector of the document. Vectors with the same id are a document: ``index.add_with_ids(vectors, documents)``
    adds them, ``index.remove_ids`` removes them, and `SearchParams.selector` selects documents.

    If all lists are probed, and no `max_codes` or budget is set, all documents are scored: the result is that of a loop
    over documents, up to ties and float32 rounding. Otherwise the `neighbours` nearest vectors of each token are
    searched, their documents are ranked by an estimate (see `functional.maxsim.estimates`), and the best `candidates`
    documents are scored exactly. If fewer documents were found, others are scored too.

    Parameters
    ----------
    index : an index with metric "ip" or "cosine"; it becomes a submodule. The state_dict has only its entries.
    k : documents that `forward` returns.
    candidates : documents to score for each query, >= 1; at least k are scored.
    neighbours : vectors to find for each token, >= 1.

    Raises ValueError for the metric "l2", TypeError for anything but a flat index or an inverted file.

    >>> from torch_ivf_module import IndexFlatIP
    >>> index = IndexFlatIP(2)
    >>> index.add_with_ids(torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.8, 0.8]]), torch.tensor([5, 5, 9]))
    >>> MaxSim(index, k=2)(torch.eye(2)[None])
    (tensor([[2.0000, 1.6000]]), tensor([[5, 9]]))
    """

    index: IndexBase

    def __init__(self, index: IndexBase, *, k: int = 10, candidates: int = 128, neighbours: int = 512) -> None:
        super().__init__()
        if not isinstance(index, IndexBase):
            raise TypeError(f"index must be a flat index or an inverted file, got {type(index).__name__}")
        if index.metric == "l2":
            raise ValueError("index must have metric 'ip' or 'cosine', got 'l2': its scores are sums of products")
        self.index = index
        self.k = positive(k, "k")
        self.candidates = positive(candidates, "candidates")
        self.neighbours = positive(neighbours, "neighbours")
        self._documents: tuple[VersionToken, Tensor, Documents] | None = None

    def forward(self, queries: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """``search(queries, self.k, mask=mask)``."""
        return self.search(queries, self.k, mask=mask)

    @opaque
    def search(
        self, queries: Tensor, k: int, *, mask: Tensor | None = None, params: SearchParams | None = None
    ) -> tuple[Tensor, Tensor]:
        """The k documents with the highest scores for each query.

        Parameters
        ----------
        queries : (nq, T, d) tokens, of any float dtype.
        k : documents per query, >= 1.
        mask : (nq, T) bool, false for padding tokens; None if there is no padding.
        params : settings of this call, as for `search` of the index, but without `exclude`, `groups` and
            `group_by`, and with one `selector` for all queries.

        Returns
        -------
        D : (nq, k) float32 scores, descending; differentiable in `queries`.
        documents : (nq, k) int64 ids of documents.

        If there are fewer than k documents, the remaining ids are -1 and the remaining D -inf. A query without tokens,
        or with a token that is not finite, has no results. The workspace is about `max_bytes` of the index; a longer
        document needs more. Raises ValueError, TypeError or RuntimeError, which name the argument.
        """
        refuse_transform("MaxSim.search")
        refuse_recording("MaxSim.search")
        index = self.index
        index.check_buffers()
        index.store.require_trained("MaxSim.search")
        queries, mask = _checked(queries, mask, index)
        k, params = positive(k, "k"), index.checked_params(params)
        if params.per_query:
            name = "selector" if params.exclude is None else "exclude"
            raise ValueError(f"{name} for each query is not for MaxSim: pass one selector of documents for all")
        refuse_groups(params, "MaxSim")
        with without_autocast(index.device):
            packed, documents = self._stored()
            tokens, weights, usable = maxsim_input(queries.float(), mask, index.metric)
            with torch.no_grad():
                # One query needs memory for the scores of all documents, and for the best rows of its tokens.
                each = 4 * documents.ids.shape[0] + 24 * tokens.shape[1] * min(self.neighbours, max(1, index.ntotal))
                step = max(1, index.max_bytes // max(1, 4 * each))
                parts = zip(tokens.detach().split(step), weights.split(step), usable.split(step), strict=True)
                found = [self._search(*part, packed, documents, k, params) for part in parts]
            numbers, rows = (torch.cat(part) for part in zip(*found, strict=True))
            if not documents.ids.shape[0]:
                return torch.full(numbers.shape, -torch.inf, device=index.device), numbers
            return maxsim_answer(tokens, weights, packed, documents, numbers, rows)

    def _search(
        self,
        tokens: Tensor,
        weights: Tensor,
        usable: Tensor,
        packed: Tensor,
        documents: Documents,
        k: int,
        params: SearchParams,
    ) -> tuple[Tensor, Tensor]:
        """The numbers (Q, k) of the best documents, -1 for none, and the best row for each token (Q, k, T)."""
        count, bytes = documents.ids.shape[0], self.index.max_bytes
        if not count:
            none = torch.full((tokens.shape[0], k), -1, device=tokens.device)
            return none, none[..., None].expand(-1, -1, tokens.shape[1])
        exhaustive = self._reads_all(params)
        if exhaustive:
            ranking = maxsim.score_all(tokens, weights, packed, documents, bytes)
        else:
            ranking = self._estimates(tokens, weights, documents, params)
        labels = torch.arange(count, device=tokens.device)
        if params.selector is not None:
            chosen = validation.selector(params.selector, "selector", tokens.device)
            labels = labels.masked_fill(~is_selected(documents.ids, chosen), -1)
        wanted = k if exhaustive else max(k, self.candidates)
        numbers = select_topk(ranking, labels.expand_as(ranking), min(wanted, count))[1]
        scores, rows = maxsim.score_candidates(tokens, weights, packed, documents, numbers.clamp(min=0), bytes)
        at = torch.arange(numbers.shape[1], device=tokens.device).expand_as(numbers)
        at = select_topk(scores, at.masked_fill((numbers < 0) | ~usable, -1), k)[1]
        found = at.clamp(min=0)
        best = rows.gather(1, found[..., None].expand(-1, -1, tokens.shape[1]))
        return numbers.gather(1, found).masked_fill(at < 0, -1), best

    def _estimates(self, tokens: Tensor, weights: Tensor, documents: Documents, params: SearchParams) -> Tensor:
        """`estimates` (Q, M) from the nearest vectors of each token."""
        # A vector that is not finite has no results, and reads no lists.
        flat = tokens.flatten(0, 1).masked_fill(weights.flatten()[:, None] == 0, torch.nan)
        scores, ids = self.index.search(flat, min(self.neighbours, max(1, self.index.ntotal)), params=params)
        shape = (*tokens.shape[:2], scores.shape[1])
        numbers = maxsim.numbers_of(documents, ids).view(shape)
        return maxsim.estimates(numbers, scores.view(shape), weights, documents.ids.shape[0])

    def _reads_all(self, params: SearchParams) -> bool:
        """Whether a search by `params` reads all rows."""
        options = self.index.search_options(1, params)
        limited = options.max_codes or options.budget is not None
        return not limited and options.nprobe >= self.index.store.nlist

    def _stored(self) -> tuple[Tensor, Documents]:
        """The packed rows (N, ...) and the documents, of one version of the index."""
        store = self.index.store
        with store.lock:
            packed, _, ids = store.packed_lists()
            known = self._documents
            if known is None or known[0].changed or known[1] is not ids:
                self._documents = known = (store.version, ids, maxsim.documents_of(ids))
            return packed, known[2]

    def graph(
        self, *, tokens: int, k: int | None = None, candidates: int | None = None, nprobe: int | None = None
    ) -> MaxSimGraph:
        """The search as a module of static shapes, for queries of `tokens` tokens; see `MaxSimGraph`.

        A setting of None is that of this module or of its index.
        """
        k = self.k if k is None else positive(k, "k")
        candidates = self.candidates if candidates is None else positive(candidates, "candidates")
        with self.index.store.lock:
            documents = self._stored()[1]
            search = SearchGraph(self.index, k=min(self.neighbours, max(1, self.index.ntotal)), nprobe=nprobe)
        return MaxSimGraph(search, documents, tokens=positive(tokens, "tokens"), k=k, candidates=max(k, candidates))

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "_documents": None}  # derived from the index

    def extra_repr(self) -> str:
        return f"k={self.k}, candidates={self.candidates}, neighbours={self.neighbours}"


def _checked(queries: Tensor, mask: Tensor | None, index: IndexBase) -> tuple[Tensor, Tensor | None]:
    """Queries (Q, T, d) and their mask (Q, T), checked."""
    queries = validation.floats(queries, "queries", index.device)
    if queries.dim() != 3 or queries.shape[2] != index.d:
        hint = "; pass queries[None] for one query" if queries.dim() == 2 else ""
        raise ValueError(f"queries must have shape (n, tokens, {index.d}), got {tuple(queries.shape)}{hint}")
    if mask is None:
        return queries, None
    if mask.dtype != torch.bool:
        raise TypeError(f"mask must be bool, true for tokens, got {mask.dtype}; cast it with mask.bool()")
    if mask.shape != queries.shape[:2]:
        raise ValueError(f"mask must have shape {tuple(queries.shape[:2])}, got {tuple(mask.shape)}")
    return queries, mask.to(queries.device)
