"""Packing, selecting and concatenating ranges, against plain loops."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from torch_ivf_module.functional import lists as ragged
from torch_ivf_module.functional import select_topk

NLIST = 5
SEEDS = st.integers(0, 2**20)


@given(
    first=st.lists(st.integers(0, NLIST - 1), max_size=30),
    second=st.lists(st.integers(0, NLIST - 1), max_size=30),
)
def test_append_equals_pack(first, second):
    assigned = torch.tensor([*first, *second], dtype=torch.int64)
    ids = torch.arange(100, 100 + len(assigned))
    x = torch.arange(2.0 * len(assigned)).view(-1, 2)
    expected = ragged.pack(x, ids, assigned, NLIST)
    split = len(first)
    packed, offsets, kept = ragged.pack(x[:split], ids[:split], assigned[:split], NLIST)
    both = ragged.append(packed, offsets, kept, x[split:], ids[split:], assigned[split:])
    for one, other in zip(both, expected, strict=True):
        assert torch.equal(one, other)
    packed, offsets, kept = expected
    assert offsets.shape == (NLIST + 1,)
    sizes = ragged.lengths(offsets)
    assert torch.equal(sizes, torch.bincount(assigned, minlength=NLIST))
    assert torch.equal(packed, x[kept - 100])
    # Each list has the rows assigned to it, in their order.
    lists = torch.repeat_interleave(torch.arange(NLIST), sizes)
    assert torch.equal(assigned[kept - 100], lists)
    for number in range(NLIST):
        assert (kept[lists == number].diff() > 0).all()


@given(
    rows=st.integers(0, 4),
    width=st.integers(0, 40),
    k=st.integers(1, 12),
    seed=SEEDS,
    spoil=st.floats(0, 1),
)
def test_select_topk(rows, width, k, seed, spoil):
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randint(-4, 5, (rows, width), generator=generator).float()
    labels = torch.randint(0, 10**6, (rows, width), generator=generator)
    bad = torch.rand(rows, width, generator=generator) < spoil
    kinds = torch.tensor([torch.nan, torch.inf, -torch.inf, 3.0])
    kind = torch.randint(0, 4, (rows, width), generator=generator)
    scores = torch.where(bad, kinds[kind], scores)
    labels = labels.masked_fill(bad & (kind == 3), -1)
    best, found = select_topk(scores.clone(), labels.clone(), k)
    assert best.shape == found.shape == (rows, k)
    assert torch.equal(found == -1, best == -torch.inf)
    for q in range(rows):
        usable = [
            (score, label)
            for score, label in zip(scores[q].tolist(), labels[q].tolist(), strict=True)
            if label >= 0 and abs(score) < torch.inf
        ]
        expected = sorted((score for score, _ in usable), reverse=True)[:k]
        assert best[q].tolist() == expected + [-torch.inf] * (k - len(expected))
        for pair in zip(best[q].tolist(), found[q].tolist(), strict=True):
            if pair[1] != -1:
                usable.remove(pair)  # raises if a pair is not in the input, or is returned too often


@given(
    width=st.integers(200, 3000),
    k=st.integers(1, 30),
    parts=st.integers(1, 5),
    seed=SEEDS,
)
def test_merge_equals_selection_among_all(width, k, parts, seed):
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randn(3, width, generator=generator)
    labels = torch.arange(width).expand(3, -1)
    selected = select_topk(scores, labels, k)
    expected = scores.topk(k, dim=1)
    assert torch.equal(selected[0], expected.values)
    assert torch.equal(selected[1], expected.indices)
    found = [select_topk(s, l, k) for s, l in zip(scores.chunk(parts, 1), labels.chunk(parts, 1), strict=True)]
    merged = select_topk(torch.cat([f[0] for f in found], 1), torch.cat([f[1] for f in found], 1), k)
    assert torch.equal(merged[0], selected[0])
    assert torch.equal(merged[1], selected[1])


@given(
    ranges=st.lists(st.lists(st.integers(0, 5), min_size=3, max_size=3), min_size=1, max_size=4),
    extra=st.integers(0, 6),
)
def test_ranges_to_positions(ranges, extra):
    sizes = torch.tensor(ranges)
    starts = torch.tensor([[100, 7, 50]]).expand(len(ranges), -1)
    width = int(sizes.sum(1).max()) + extra
    positions, probe = ragged.ranges_to_positions(starts, sizes, width)
    for q, row in enumerate(ranges):
        pairs = [
            (start + i, p) for p, (start, size) in enumerate(zip((100, 7, 50), row, strict=True)) for i in range(size)
        ]
        assert positions[q, : len(pairs)].tolist() == [at for at, _ in pairs]
        assert (positions[q, len(pairs) :] < 0).all()
        assert probe[q, : len(pairs)].tolist() == [p for _, p in pairs]
