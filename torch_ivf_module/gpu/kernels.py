# mypy: disable-error-code="no-untyped-def, untyped-decorator"
"""The Triton kernel: ranking scores of lists for the queries that probe them, reduced to maxima on the chip.

Q queries, N vectors, L lists, T pairs of a query and a list, B blocks, d dim. Groups, blocks and sections of the rows
of a list are those of functional/block_maxima.py.

The pairs are sorted by list. A program multiplies up to TILE queries of one list with some blocks of its rows, in
float32, and writes the maximum of each group of rows; scores stay on the chip. With TILE = 1 it is a sum of products
instead of `tl.dot`, for lists that few queries probe. Imported only where it is used, since Triton is optional.
"""

from typing import Any

import triton
import triton.language as tl
from torch import Tensor
from torch.library import triton_op, wrap_triton

from ..functional.block_maxima import BLOCK, GROUP, SECTION

_CHAIN = 512  # dimensions that are added one after another, as metric.rounding assumes
_DIMS = 32  # dimensions in one product: with 64, tiles of 64 queries take 96 KiB of the chip, which not every one has


@triton.jit
def _float_at(address):
    """The little-endian float32 at these byte addresses, which may not be aligned."""
    bits = tl.zeros_like(tl.load(address)).to(tl.uint32)
    for byte in tl.static_range(4):
        bits |= tl.load(address + byte).to(tl.uint32) << (8 * byte)
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def kernel(
    x,  # (Q, d) float32
    packed,  # (N, W) floats, W = d, or coded rows of W bytes; see row_codes
    bias,  # (N,) float32
    offsets,  # (L + 1,)
    sizes,  # (L + 1,)
    queries,  # (T,) the query of each pair
    limits,  # (T,) rows to read
    blocks,  # (T,) where the maxima of a pair begin
    tile_lists,  # (tiles,) the list of each tile, L for none
    tile_pairs,  # (tiles,) its first pair
    pair_ends,  # (L + 1,) where the pairs of each list end
    coarse,  # (B,) float32, written: maxima of blocks
    fine,  # (B, BLOCK) float32, written: maxima of their groups
    parts,  # programs of a tile
    nlist,
    D: tl.constexpr,
    W: tl.constexpr,
    BITS: tl.constexpr,  # of codes, 0 for floats
    HAS_BIAS: tl.constexpr,
    TILE: tl.constexpr,
    PART: tl.constexpr,  # blocks of a program
    DIMS: tl.constexpr,
    CHAIN: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK: tl.constexpr,
    SECTION: tl.constexpr,
):
    tile, part = tl.program_id(0) // parts, tl.program_id(0) % parts
    number = tl.load(tile_lists + tile)
    if number >= nlist:
        return
    pair = tl.load(tile_pairs + tile) + tl.arange(0, TILE)
    real = pair < tl.load(pair_ends + number)
    query = tl.load(queries + pair, mask=real, other=0)
    limit = tl.load(limits + pair, mask=real, other=0)
    address = tl.load(blocks + pair, mask=real, other=0)
    start, size = tl.load(offsets + number), tl.load(sizes + number)
    SPAN: tl.constexpr = GROUP * BLOCK
    entry, dim = tl.arange(0, SPAN), tl.arange(0, DIMS)
    last = tl.minimum((part + 1) * PART, (size + SPAN - 1) // SPAN)
    for block in range(part * PART, last):
        section = block // (SECTION // SPAN) * SECTION  # its first row, counted in the list
        rows = tl.minimum(size - section, SECTION)
        stride = (rows + GROUP - 1) // GROUP
        group = block % (SECTION // SPAN) * BLOCK + entry // GROUP
        row = group + entry % GROUP * stride
        there = (group < stride) & (row < rows)
        at = tl.where(there, start + section + row, 0)
        scores = tl.zeros((TILE, SPAN), tl.float32)
        for chain in range(0, D, CHAIN):
            chain_sum = tl.zeros((TILE, SPAN), tl.float32)
            for first in range(chain, tl.minimum(chain + CHAIN, D), DIMS):
                inside = first + dim < D
                y = tl.load(
                    x + query[:, None] * D + (first + dim)[None, :], mask=real[:, None] & inside[None, :], other=0.0
                )
                # (SPAN, DIMS)
                mask = there[:, None] & inside[None, :]
                if BITS == 0:
                    v = tl.load(packed + at[:, None] * W + (first + dim)[None, :], mask=mask, other=0.0).to(tl.float32)
                else:
                    byte = (first + dim) * BITS // 8
                    code = tl.load(packed + at[:, None] * W + byte[None, :], mask=mask, other=0)
                    if BITS == 4:
                        code = (code >> ((first + dim) % 2 * 4).to(tl.uint8)[None, :]) & 15
                    scale, least = _float_at(packed + at * W + (W - 8)), _float_at(packed + at * W + (W - 4))
                    v = tl.where(mask, code.to(tl.float32) * scale[:, None] + least[:, None], 0.0)
                if TILE == 1:
                    chain_sum += tl.sum(y * v, axis=1)[None, :]
                else:
                    chain_sum = tl.dot(y, tl.trans(v), chain_sum, input_precision="ieee")
            scores += chain_sum
        if HAS_BIAS:
            scores += tl.load(bias + at)[None, :]
        read = there[None, :] & (section + row[None, :] < limit[:, None])
        scores = tl.where(read & (tl.abs(scores) < float("inf")), scores, float("-inf"))  # NaN is not below inf
        maxima = tl.max(tl.reshape(scores, (TILE, BLOCK, GROUP)), axis=2)
        to = address + block
        tl.store(fine + to[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :], maxima, mask=real[:, None])
        tl.store(coarse + to, tl.max(maxima, axis=1), mask=real)


def constants(d: int, width: int, bits: int, *, has_bias: bool, tile: int, part: int) -> dict[str, Any]:
    """What the kernel is compiled for, beside the dtypes."""
    dims = min(_DIMS, max(16, triton.next_power_of_2(d)))
    own = {"D": d, "W": width, "BITS": bits, "HAS_BIAS": has_bias, "TILE": tile, "PART": part, "DIMS": dims}
    return {**own, "CHAIN": _CHAIN, "GROUP": GROUP, "BLOCK": BLOCK, "SECTION": SECTION}


@triton_op("torch_ivf_module::triton_block_maxima", mutates_args={"coarse", "fine"})
def block_maxima(
    x: Tensor,
    packed: Tensor,
    bias: Tensor,
    offsets: Tensor,
    sizes: Tensor,
    queries: Tensor,
    limits: Tensor,
    blocks: Tensor,
    tile_lists: Tensor,
    tile_pairs: Tensor,
    pair_ends: Tensor,
    coarse: Tensor,
    fine: Tensor,
    parts: int,
    bits: int,
    tile: int,
    part: int,
) -> None:
    """`kernel` for all tiles; `parts` programs each, of `part` blocks; bias is (N,), or (0,) for none."""
    wrap_triton(kernel)[(tile_lists.shape[0] * parts,)](
        x,
        packed,
        bias,
        offsets,
        sizes,
        queries,
        limits,
        blocks,
        tile_lists,
        tile_pairs,
        pair_ends,
        coarse,
        fine,
        parts,
        offsets.shape[0] - 1,
        **constants(x.shape[1], packed.shape[1], bits, has_bias=bias.shape[0] > 0, tile=tile, part=part),
    )
