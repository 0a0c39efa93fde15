"""The scan by the Triton kernel: which pairs of query and list its programs take, and the selection from its maxima.

Q queries, L lists, P probes, T = Q * P pairs, d dim, k results, B blocks. Nothing is read back from the device: the
number of programs follows from sizes that the host knows.
"""

from __future__ import annotations

import importlib.util
import os

import torch
from torch import Tensor

from ..functional.block_maxima import BLOCK, SPAN, blocks_of, first_positions
from ..functional.chunking import in_chunks
from ..functional.kernels import SCANS
from ..functional.lists import InvertedLists, most_rows, narrow
from ..functional.row_codes import bits_of
from ..functional.scan_lists import BLOCK_BYTES, best_of_groups, blocks_bound, joined_results

_DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.uint8)  # the last of coded rows
# None of these was measured on a device.
_TILES = (64, 32, 16)  # queries of a program; `tl.dot` takes no fewer than 16
_FEW = 4  # up to so many queries a list, a program takes one query
_PART = 32  # blocks of a program: a section
_PART_FEW = 8  # of one query


class TritonScan:
    """Calls of the Triton kernel, as `functional.kernels.ScanKernel`."""

    name = "triton"

    def __init__(self) -> None:
        self.enabled = os.environ.get("TORCH_IVF_TRITON") == "1"
        self.interpreted = os.environ.get("TRITON_INTERPRET") == "1"  # then it runs on CPUs too

    def serves(self, x: Tensor, packed: Tensor) -> bool:
        """Whether it is to be used for queries x (Q, d) and stored rows (N, W). RuntimeError if Triton is missing."""
        if not self.enabled or (x.is_cpu and not self.interpreted):
            return False
        if importlib.util.find_spec("triton") is None:
            raise RuntimeError(
                "TORCH_IVF_TRITON=1 needs the package triton, which the builds of PyTorch for CUDA and ROCm bring: "
                "install such a build, or unset TORCH_IVF_TRITON to search by PyTorch operations"
            )
        return packed.dtype in _DTYPES and packed.is_contiguous()

    def __call__(
        self, x: Tensor, lists: InvertedLists, probed: Tensor, limits: Tensor | None, k: int, width: int, max_bytes: int
    ) -> tuple[Tensor, Tensor]:
        """The k best rows of the probed lists, as `scan_queries` gives them; `width` is not used."""
        probes = probed.shape[1]
        most = blocks_bound(most_rows(lists, probes), probes)
        step = max(1, max_bytes // (most * BLOCK_BYTES + 64 * probes + 32 * k))
        sizes = lists.sizes[probed] if limits is None else limits

        def scanned(x: Tensor, probed: Tensor, sizes: Tensor) -> tuple[Tensor, Tensor]:
            first, maxima = _maxima(x.contiguous(), lists, probed, sizes, most)
            chosen = None if limits is None else sizes
            return joined_results(best_of_groups(x, lists, probed, chosen, first, maxima, k, most))

        return in_chunks(scanned, step, x, probed, sizes)


def _maxima(
    x: Tensor, lists: InvertedLists, probed: Tensor, sizes: Tensor, most: int
) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """Where the maxima of each pair begin (Q, P), in blocks, and the maxima of blocks (B,) and groups (B, BLOCK).

    sizes (Q, P) are the rows to read; `most` blocks are kept for each query, so B = Q * most.
    """
    from .kernels import block_maxima

    queries, probes = probed.shape
    nlist = lists.sizes.shape[0] - 1
    blocks = blocks_of(lists.sizes)[probed]
    first = blocks.cumsum(1) - blocks + torch.arange(queries, device=x.device)[:, None] * most
    target, order = torch.sort(narrow(probed.flatten(), nlist + 1), stable=True)
    begins = first_positions(target, nlist)
    ends = torch.nn.functional.pad(begins[1:], (0, 1), value=order.shape[0])
    each = order.shape[0] / max(1, min(nlist, order.shape[0]))  # pairs of a list that is probed, on average
    tile = 1 if each <= _FEW else next((size for size in _TILES if size <= each), _TILES[-1])
    tiles = torch.div(ends - begins + (tile - 1), tile, rounding_mode="floor")
    tiles[-1] = 0  # of no list
    last = tiles.cumsum(0)
    # At most one tile of each list is not full.
    number = torch.arange(-(-order.shape[0] // tile) + min(nlist, order.shape[0]), device=x.device)
    tile_lists = torch.searchsorted(last, number, right=True).clamp_(max=nlist)
    tile_pairs = begins[tile_lists] + (number - (last - tiles)[tile_lists]) * tile
    part = _PART_FEW if tile == 1 else _PART
    parts = -(-most_rows(lists, 1) // (SPAN * part))
    coarse = torch.empty(queries * most, dtype=torch.float32, device=x.device)
    fine = torch.empty(queries * most, BLOCK, dtype=torch.float32, device=x.device)
    coded = lists.packed.dtype == torch.uint8
    block_maxima(
        x,
        lists.packed,
        lists.bias,
        lists.offsets,
        lists.sizes,
        torch.div(order, probes, rounding_mode="floor"),
        sizes.flatten()[order],
        first.flatten()[order],
        tile_lists,
        tile_pairs,
        ends,
        coarse,
        fine,
        parts,
        (bits_of(lists.packed.shape[1], x.shape[1]) or 0) if coded else 0,
        tile,
        part,
    )
    return first, (coarse, fine)


SCAN = TritonScan()
SCANS.append(SCAN)
