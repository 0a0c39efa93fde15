"""Pure functions on tensors: the arithmetic of the index, without its state. No package but torch is imported.

Shapes: Q queries, N vectors, L lists, P probes per query, d dim, k results, K candidates per query, H hits.
A row is a position in the packed vectors, an id is the user's label of it; functions here take and return rows.

    search.search ─┬─ kernels.Kernel.search   all of the following in one call, if there is a kernel (mode "auto"); with
                   │                          a budget or stats, probe and capped_lists are called before it
                   └─ in PyTorch operations, for chunks of queries:
                      ├─ probe.probe          the P nearest of L centroids
                      ├─ search.capped_lists  max_codes and budget.row_limits
                      ├─ for each segment (packed lists, pending rows):
                      │  ├─ scan_lists / scan_queries   K candidates by ranking score   (cost.cheapest selects)
                      │  ├─ rescore.rescore             exact scores, the k best
                      │  └─ scan_above.scan_above       second pass for uncertified queries: every row that could
                      │                                 still be a result
                      └─ select.merge         the k best of all segments; lists.ids_at then gives their ids
    range_scan.range_search ── probe.probe, scan_above.scan_above, exact scores
    kmeans.kmeans ── probe.nearest_by_ranking

options.py has the options of a search as one value, metric.py every score and rounding bound, select.py the one top-k,
lists.py the inverted lists as one value, codec.py their 8-bit codes, which a kernel reads first. chunking.py bounds
memory, transforms.py makes scores differentiable.
"""

from .kmeans import kmeans
from .lists import InvertedLists
from .select import select_topk

__all__ = ["InvertedLists", "kmeans", "select_topk"]
