"""Adding vectors: ids, errors, pending rows, zero rows."""

from __future__ import annotations

from copy import deepcopy

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from tests.datasets import PLAIN, normal
from tests.kinds import KINDS, as_stored, each_empty, each_kind, trained
from tests.oracle import agree, check, check_range, probed, stored_rows
from tests.problems import ivf, shared
from tests.states import same_state, snapshot, unchanged
from torch_ivf_module import load

LAST = 2**63 - 1


TOO_FAR = (ValueError, RuntimeError, OverflowError)


# --- adding ---------------------------------------------------------------------------------------------------


@each_empty
def test_ids_increase_and_are_never_reused(empty):
    index = empty()
    x = normal(30, 8)
    index.add(x[:10])
    index.remove_ids(torch.arange(5, 10))
    index.add(x[10:15])
    assert sorted(index.list_ids.tolist()) == [*range(5), *range(10, 15)]
    index.remove_ids(index.list_ids)
    assert index.ntotal == 0
    index.add(x[:2])
    assert sorted(index.list_ids.tolist()) == [15, 16]
    index.add_with_ids(x[:2], torch.tensor([100, 3]))
    index.add(x[:1])
    assert sorted(index.list_ids.tolist()) == [3, 15, 16, 100, 101]
    index.add_with_ids(x[:1], torch.tensor([-9]))
    index.add(x[:1])
    assert int(index.next_id) == 103
    index.add(x[:0])
    index.add_with_ids(x[:0], torch.tensor([], dtype=torch.int64))
    assert int(index.next_id) == 103
    assert index.ntotal == 7


@each_empty
def test_any_id_but_minus_one_is_valid(empty):
    index = empty()
    x = normal(6, 8)
    ids = torch.tensor([LAST, -(2**63), 0, 5, 5, -2])
    index.add_with_ids(x, ids)
    assert sorted(index.list_ids.tolist()) == sorted(ids.tolist())
    D, I = index.search(x, 1)
    assert torch.equal(I[:, 0], ids)
    torch.testing.assert_close(D[:, 0], (x - as_stored(index, x)).square().sum(1), rtol=1e-5, atol=0)
    with unchanged(index), pytest.raises(ValueError, match="ids"):
        index.add_with_ids(x[:2], torch.tensor([8, -1]))


@each_empty
def test_int32_ids_are_converted(empty):
    index = empty()
    index.add_with_ids(normal(3, 8), torch.tensor([7, 8, 9], dtype=torch.int32))
    assert index.list_ids.dtype == torch.int64
    assert sorted(index.list_ids.tolist()) == [7, 8, 9]
    assert index.remove_ids(torch.tensor([8], dtype=torch.int32)) == 1


@each_empty
@pytest.mark.parametrize("before", [LAST, LAST - 2])
def test_ids_beyond_int64_are_refused(empty, before):
    index = empty()
    x = normal(8, 8)
    index.add_with_ids(x[:1], torch.tensor([before]))
    with unchanged(index), pytest.raises(TOO_FAR, match=r"2\^63|2\*\*63|9223372036854775807"):
        index.add(x[:3])
    index.add(x[:0])
    index.add_with_ids(x[:1], torch.tensor([4]))
    assert index.ntotal == 2
    loaded = deepcopy(index)
    loaded.load_state_dict({name: value for name, value in index.state_dict().items() if name != "next_id"})
    for target in (index, loaded):
        with pytest.raises(TOO_FAR):
            target.add(x[:3])
        assert len(target.list_ids.unique()) == target.ntotal


@each_empty
def test_add_after_the_largest_id_is_refused(empty):
    index = empty()
    index.add_with_ids(normal(1, 8), torch.tensor([LAST]))
    with unchanged(index), pytest.raises(TOO_FAR):
        index.add(normal(1, 8))


@each_empty
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_the_first_row_that_is_not_finite_is_named(empty, value):
    index = empty()
    index.add(normal(4, 8))
    bad = normal(20, 8)
    bad[13, 2] = value
    bad[16] = value
    for call in (
        lambda: index.add(bad),
        lambda: index.add_with_ids(bad, torch.arange(100, 120)),
        lambda: index.update(torch.arange(4), bad[12:16]),
    ):
        with unchanged(index), pytest.raises(ValueError, match=r"row (13|1)\b"):
            call()


@each_empty
@pytest.mark.parametrize("source", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_rows_beyond_the_storage_dtype_are_refused(empty, source):
    """They would be stored as infinities, so they count as not finite."""
    if "bits" in empty().config():
        with pytest.raises(ValueError, match="dtype must be None or"):
            empty(dtype=torch.float16)
        return
    index = empty(dtype=torch.float16)
    x = normal(5, 8).to(source)
    x[3, 1] = 1e6
    with unchanged(index), pytest.raises(ValueError, match=r"(?s)float16.*\b3\b|\b3\b.*float16"):
        index.add(x)
    index.add(x[:3])
    assert index.ntotal == 3


@each_empty
def test_float64_rows_beyond_float32_are_refused(empty):
    index = empty()
    x = normal(5, 8).double()
    x[2, 0] = 1e200
    with unchanged(index), pytest.raises(ValueError, match=r"\b2\b"):
        index.add(x)


@each_empty
def test_add_stores_a_detached_copy(empty):
    index = empty()
    x = normal(20, 8).requires_grad_()
    index.add(x)
    index.add_with_ids(x, torch.arange(20, 40))
    assert not index.store.packed.requires_grad
    assert x.grad_fn is None
    index.add(normal(1, 8))
    with torch.no_grad():
        x.zero_()
        ids = torch.arange(200, 220)
        index.add_with_ids(x, ids)
        ids.zero_()
    assert sorted(index.list_ids.tolist()) == [*range(41), *range(200, 220)]
    assert (index.reconstruct(3) != 0).any()


READERS = {
    "ntotal": lambda index: index.ntotal,
    "search": lambda index: int((index.search(normal(1, PLAIN.d), 5000)[1] >= 0).sum()),
    "range_search": lambda index: len(index.range_search(normal(1, PLAIN.d), 1e6)[2]),
    "forward": lambda index: int((index(normal(PLAIN.d)))[1].max() >= 0) * index.ntotal,
    "state_dict": lambda index: len(index.state_dict()["list_ids"]),
    "packed rows": lambda index: len(getattr(index, index.store.format.name)),
    "list_ids": lambda index: len(index.list_ids),
    "list_offsets": lambda index: int(index.list_offsets[-1]),
    "next_id": lambda index: int(index.next_id),
    "named_buffers": lambda index: len(dict(index.named_buffers())["list_ids"]),
    "reconstruct": lambda index: index.ntotal if index.reconstruct(index.ntotal - 1).shape else 0,
    "reconstruct_n": lambda index: len(index.reconstruct_n(0, index.ntotal)),
    "deepcopy": lambda index: len(deepcopy(index).list_ids),
    "half": lambda index: len(deepcopy(index).half().state_dict()["list_ids"]),
    "remove_ids": lambda index: deepcopy(index).remove_ids(torch.arange(10**4)),
    "repr": lambda index: index.ntotal if f"{index.ntotal}" in repr(index) else 0,
}


@pytest.mark.parametrize("rows", [1, 7, 130, 1000])
@pytest.mark.parametrize("reader", READERS)
@each_kind
def test_every_method_sees_pending_rows(kind, reader, rows):
    """Pending rows are part of the index for every method."""
    index = KINDS[kind]().index
    if not index.store.flat:
        index.nprobe = index.nlist
    for number in range(2):
        index.add(normal(rows, PLAIN.d, seed=50 + number))
        assert READERS[reader](index) == PLAIN.nb + rows * (number + 1)


@each_kind
def test_adding_the_rows_of_the_index_itself(kind):
    index, base, queries = KINDS[kind]()
    index.add(index.reconstruct_batch(index.list_ids))
    index.add_with_ids(index.reconstruct_batch(index.list_ids[:9]), index.list_ids[:9])
    assert index.ntotal == 2 * len(base) + 9
    index.update(torch.arange(20, 25), index.reconstruct_n(0, 5))
    lists = probed(index, queries) if not index.store.flat else None
    check(index.search(queries, 10), queries, stored_rows(index), "l2", 10, lists)


@pytest.mark.parametrize("rows", [1, 7, 130])
@each_kind
def test_searching_after_each_add(kind, rows, tmp_path):
    index, _, queries = KINDS[kind]()
    packed = deepcopy(index)
    for number in range(3):
        extra = normal(rows, PLAIN.d, seed=50 + number)
        index.add(extra)
        packed.add(extra)
        packed.state_dict()
        lists = probed(packed, queries) if not index.store.flat else None
        check(index.search(queries, 10), queries, stored_rows(packed), "l2", 10, lists)
        check_range(index.range_search(queries, 12.0), queries, stored_rows(packed), "l2", 12.0, lists)
        assert torch.equal(index.reconstruct(index.ntotal - 1), as_stored(index, extra)[-1])
    index.add(extra)
    packed.add(extra)
    index.save(tmp_path / "index.pt")
    assert same_state(snapshot(load(tmp_path / "index.pt")), snapshot(packed))
    index.add(extra)
    index.reset()
    assert index.ntotal == 0
    assert (index.search(queries, 3)[1] == -1).all()


def test_many_small_adds_equal_one():
    reference, base, queries = shared()
    index, _, _ = shared()
    index.reset()
    start = 0
    for step in (1, 1, 30, 2, 200, 0, 266):
        index.add_with_ids(base[start : start + step], torch.arange(start, start + step))
        start += step
    assert start == len(base)
    assert same_state(snapshot(index), snapshot(reference))
    agree(index.search(queries, 10), reference.search(queries, 10), rtol=1e-6)


def test_rows_of_a_list_are_in_the_order_of_adding():
    index, _, _ = shared()
    offsets = index.list_offsets
    for start, end in zip(offsets[:-1].tolist(), offsets[1:].tolist(), strict=True):
        ids = index.list_ids[start:end]
        assert (ids.diff() > 0).all()


def test_many_small_adds_copy_little():
    """The bytes of vectors that several hundred calls allocate must not grow with the square of their number."""

    class Written(TorchDispatchMode):
        total = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor) and out.dim() == 2 and out.shape[1] == 8 and not out._is_view():
                self.total += out.nbytes
            return out

    index = trained()
    x = normal(1000, 8)
    with Written() as written:
        for rows in x.split(3):
            index.add(rows)
    packed = index.packed_embeddings
    assert written.total < 40 * packed.nbytes


# --- zero rows ------------------------------------------------------------------------------------------------


@each_empty
def test_zero_rows_are_valid_in_every_method(empty):
    index = empty()
    none = torch.zeros(0, 8)
    index.add(none)
    index.add_with_ids(none, torch.zeros(0, dtype=torch.int64))
    index.update(torch.zeros(0, dtype=torch.int64), none)
    assert index.ntotal == 0
    for x, rows in ((none, 0), (normal(3, 8), 3)):
        D, I = index.search(x, 4)
        assert D.shape == I.shape == (rows, 4)
        assert (I == -1).all()
        lims, D, I = index.range_search(x, 5.0)
        assert lims.tolist() == [0] * (rows + 1)
        assert D.shape == I.shape == (0,)
    assert index.reconstruct_n(0, 0).shape == (0, 8)
    index.add(normal(5, 8))
    assert index.search(none, 4)[0].shape == (0, 4)


def test_answers_do_not_depend_on_the_centroids_if_all_lists_are_probed():
    """Whatever the centroids, probing every list gives the same answers."""
    first, _, queries = ivf(PLAIN, nprobe=PLAIN.nlist)
    other = deepcopy(first)
    other.train(normal(480, PLAIN.d, seed=3))
    agree(first.search(queries, 10), other.search(queries, 10), rtol=1e-5)
