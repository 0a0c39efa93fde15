"""MaxSim against a loop over documents: answers, edge cases, derivatives, changes of the index, and model files.

Q queries, T tokens per query, d dim, M documents.
"""

from __future__ import annotations

import copy
import io

import pytest
import torch
from torch import Tensor

from tests.datasets import lattice, normal
from torch_ivf_module import (
    IndexFlat,
    IndexFlatIP,
    IndexFlatL2,
    IndexIVFFlat,
    IndexIVFScalarQuantizer,
    IndexScalarQuantizer,
    MaxSim,
    SearchParams,
    export,
)
from torch_ivf_module.functional import maxsim
from torch_ivf_module.functional import metric as metrics

D, TOKENS = 8, 5


def corpus(count: int = 60, longest: int = 9, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Vectors (N, d) of documents of 1 to `longest` vectors, and their document ids (N,), mixed."""
    generator = torch.Generator().manual_seed(seed)
    sizes = torch.randint(1, longest + 1, (count,), generator=generator)
    sizes[:3] = torch.tensor([1, longest, 1])
    documents = (torch.arange(count) * 3 + 7).repeat_interleave(sizes)
    order = torch.randperm(documents.shape[0], generator=generator)
    return normal(documents.shape[0], D, seed=seed), documents[order]


def loop(vectors: Tensor, documents: Tensor, queries: Tensor, k: int, metric: str = "ip") -> tuple[Tensor, Tensor]:
    """The answer by a loop over documents of vectors as they are stored."""
    queries = metrics.prepare(queries, metric)
    ids = documents.unique()
    sums = [(queries @ vectors[documents == id].T).max(2).values.sum(1) for id in ids]
    best, at = torch.stack(sums, 1).topk(min(k, len(ids)), dim=1)
    return best, ids[at]


INDEXES = {
    "flat ip": lambda: IndexFlatIP(D),
    "flat cosine": lambda: IndexFlat(D, "cosine"),
    "ivf ip": lambda: IndexIVFFlat(D, nlist=6, nprobe=6, metric="ip"),
    "ivf cosine": lambda: IndexIVFFlat(D, nlist=6, nprobe=6, metric="cosine"),
    "codes": lambda: IndexScalarQuantizer(D, metric="ip"),
    "ivf codes": lambda: IndexIVFScalarQuantizer(D, nlist=6, nprobe=6, metric="cosine", bits=4),
}


def filled(kind: str = "ivf ip", **sizes: int) -> tuple[MaxSim, Tensor, Tensor]:
    """A MaxSim, the vectors as they are stored (N, d) and the documents (N,) in the order of the rows."""
    index = INDEXES[kind]()
    vectors, documents = corpus(**sizes)
    if not index.is_trained:
        index.train(normal(400, D, seed=1))
    index.add_with_ids(vectors, documents)
    return (searcher := MaxSim(index)), *stored(searcher)


def stored(searcher: MaxSim) -> tuple[Tensor, Tensor]:
    packed, _, ids = searcher.index.store.packed_lists()
    return maxsim.as_float(packed, D), ids


def same(found: tuple[Tensor, Tensor], expected: tuple[Tensor, Tensor]) -> None:
    torch.testing.assert_close(found[0], expected[0], rtol=1e-5, atol=1e-5)
    assert torch.equal(found[1], expected[1])


@pytest.mark.parametrize("kind", INDEXES)
@pytest.mark.parametrize("max_bytes", [1, 3000, 1 << 28])
def test_all_lists_give_the_answer_of_the_loop(kind, max_bytes):
    searcher, vectors, documents = filled(kind)
    searcher.index.max_bytes = max_bytes
    queries = normal(7, TOKENS, D, seed=3)
    same(searcher(queries), loop(vectors, documents, queries, 10, searcher.index.metric))


@pytest.mark.parametrize("max_bytes", [1, 3000, 1 << 28])
def test_few_lists_give_exact_scores_of_the_candidates(max_bytes):
    searcher, vectors, documents = filled()
    searcher.index.max_bytes = max_bytes
    queries = normal(7, TOKENS, D, seed=3)
    scores, ids = searcher.search(queries, 60, params=SearchParams(nprobe=2))  # all 60 are candidates
    same((scores, ids), loop(vectors, documents, queries, 60))
    searcher.candidates, searcher.neighbours = 12, 20
    scores, ids = searcher.search(queries, 3, params=SearchParams(nprobe=2))
    every, order = loop(vectors, documents, queries, 60)
    for row, id, all_scores, all_ids in zip(scores, ids, every, order, strict=True):
        expected = torch.stack([all_scores[all_ids == one][0] for one in id])
        torch.testing.assert_close(row, expected, rtol=1e-5, atol=1e-5)


def test_a_document_that_holds_the_tokens_is_found_by_one_list():
    searcher, vectors, documents = filled("ivf cosine", count=200)
    searcher.candidates, searcher.neighbours = 20, 10
    ids = documents.unique()[:20]
    queries = torch.stack([vectors[documents == id][:1] for id in ids]).repeat(1, 3, 1)
    found = searcher.search(queries, 1, params=SearchParams(nprobe=1))
    assert torch.equal(found[1][:, 0], ids)


def test_estimates_bound_the_scores_where_all_lists_are_probed():
    searcher, vectors, documents = filled()
    tokens = normal(4, TOKENS, D, seed=5)
    table = maxsim.documents_of(documents)
    scores, ids = searcher.index.search(tokens.flatten(0, 1), 30)
    numbers, scores = maxsim.numbers_of(table, ids).view(4, TOKENS, 30), scores.view(4, TOKENS, 30)
    bounds = maxsim.estimates(numbers, scores, torch.ones(4, TOKENS), 60) + scores[:, :, -1].sum(1, keepdim=True)
    exact, order = loop(vectors, documents, tokens, 60)
    assert (bounds.gather(1, maxsim.numbers_of(table, order)) >= exact - 1e-4).all()


@pytest.mark.parametrize("nprobe", [2, 6])
def test_masked_tokens_do_not_count(nprobe):
    searcher, vectors, documents = filled()
    queries = normal(3, TOKENS, D, seed=3)
    mask = torch.ones(3, TOKENS, dtype=torch.bool)
    mask[:, 3:] = False
    queries[:, 3:] = torch.nan
    found = searcher.search(queries, 60, mask=mask, params=SearchParams(nprobe=nprobe))
    same(found, loop(vectors, documents, queries[:, :3], 60))


@pytest.mark.parametrize("nprobe", [2, 6])
def test_queries_without_results(nprobe):
    searcher, vectors, documents = filled()
    queries = normal(4, TOKENS, D, seed=3)
    mask = torch.ones(4, TOKENS, dtype=torch.bool)
    mask[1] = False
    queries[2, 0, 0] = torch.inf
    scores, ids = searcher.search(queries, 60, mask=mask, params=SearchParams(nprobe=nprobe))
    assert (ids[1:3] == -1).all()
    assert (scores[1:3] == -torch.inf).all()
    expected = loop(vectors, documents, queries[[0, 3]], 60)
    same((scores[[0, 3]], ids[[0, 3]]), expected)


def test_more_results_than_documents_and_no_queries():
    searcher, vectors, documents = filled(count=4)
    queries = normal(2, TOKENS, D, seed=3)
    for nprobe in (1, 6):
        scores, ids = searcher.search(queries, 9, params=SearchParams(nprobe=nprobe))
        same((scores[:, :4], ids[:, :4]), loop(vectors, documents, queries, 4))
        assert (ids[:, 4:] == -1).all()
        assert (scores[:, 4:] == -torch.inf).all()
        assert searcher.search(queries[:0], 9, params=SearchParams(nprobe=nprobe))[1].shape == (0, 9)
        assert (searcher.search(queries[:, :0], 9, params=SearchParams(nprobe=nprobe))[1] == -1).all()


@pytest.mark.parametrize("kind", INDEXES)
def test_an_empty_index_finds_nothing(kind):
    index = INDEXES[kind]()
    if not index.is_trained:
        with pytest.raises(RuntimeError, match=r"MaxSim\.search needs a trained index"):
            MaxSim(index)(normal(2, TOKENS, D))
        index.train(normal(400, D, seed=1))
    for nprobe in (1, 6):
        scores, ids = MaxSim(index).search(normal(2, TOKENS, D), 3, params=SearchParams(nprobe=nprobe))
        assert torch.equal(ids, torch.full((2, 3), -1))
        assert torch.equal(scores, torch.full((2, 3), -torch.inf))


def test_ties_and_negative_ids():
    index = IndexFlatIP(3)
    vectors, documents = lattice(40, 3), torch.arange(40) % 11 - 5
    documents[documents == -1] = 100
    index.add_with_ids(vectors, documents)
    queries = lattice(5, 4, 3, seed=2)
    scores, ids = MaxSim(index, k=11)(queries)
    assert torch.equal(scores, loop(vectors, documents, queries, 11)[0])
    assert torch.equal(ids.sort(1).values, documents.unique().expand(5, -1))


def test_changes_of_the_index_are_seen():
    searcher, vectors, documents = filled()
    queries = normal(3, TOKENS, D, seed=3)
    best = searcher(queries)[1][0, 0]
    searcher.index.remove_ids(best[None])
    left = documents != best
    same(searcher(queries), loop(vectors[left], documents[left], queries, 10))
    searcher.index.add_with_ids(queries[0], torch.full((TOKENS,), 1_000_000))
    same(searcher(queries), loop(*stored(searcher), queries, 10))
    assert (stored(searcher)[1] == 1_000_000).sum() == TOKENS
    searcher.index.reset()
    assert (searcher(queries)[1] == -1).all()


@pytest.mark.parametrize("nprobe", [2, 6])
def test_a_selector_selects_documents(nprobe):
    searcher, vectors, documents = filled()
    queries, chosen = normal(3, TOKENS, D, seed=3), documents.unique()[::3]
    for selector in (chosen, torch.zeros(500, dtype=torch.bool).index_fill_(0, chosen, True)):
        params = SearchParams(nprobe=nprobe, selector=selector)
        found = searcher.search(queries, 20, params=params)
        kept = torch.isin(documents, chosen)
        same(found, loop(vectors[kept], documents[kept], queries, 20))


def test_limits_of_rows_are_limits():
    searcher, *_ = filled()
    queries = normal(3, TOKENS, D, seed=3)
    searcher.candidates, searcher.neighbours = 1, 5
    for params in (SearchParams(max_codes=20), SearchParams(candidate_budget=20)):
        found = searcher.search(queries, 1, params=params)
        assert (found[1] >= 0).all()
        assert (found[0] <= searcher.search(queries, 1)[0] + 1e-5).all()


@pytest.mark.parametrize("kind", ["ivf ip", "ivf cosine", "codes"])
@pytest.mark.parametrize("nprobe", [2, 6])
def test_gradients_are_those_of_the_loop(kind, nprobe):
    searcher, vectors, documents = filled(kind)
    searcher.candidates = 60
    mask = torch.ones(3, TOKENS, dtype=torch.bool)
    mask[:, 4:] = False
    queries = normal(3, TOKENS, D, seed=3).requires_grad_()
    weights = normal(3, 10, seed=8)
    found = searcher.search(queries, 10, mask=mask, params=SearchParams(nprobe=nprobe))
    (gradient,) = torch.autograd.grad((found[0] * weights).sum(), queries)
    scores, ids = loop(vectors, documents, queries[:, :4], 10, searcher.index.metric)
    (expected,) = torch.autograd.grad((scores * weights).sum(), queries)
    assert torch.equal(found[1], ids)
    torch.testing.assert_close(gradient, expected, rtol=1e-4, atol=1e-5)
    assert (gradient[:, 4:] == 0).all()


def test_padding_has_no_gradient():
    searcher, *_ = filled(count=4)
    queries = normal(2, TOKENS, D, seed=3)
    queries[1, 0, 0] = torch.nan
    queries.requires_grad_()
    scores, ids = searcher.search(queries, 9)
    (gradient,) = torch.autograd.grad(scores[ids >= 0].sum(), queries)
    assert gradient.isfinite().all()
    assert (gradient[1] == 0).all()


def test_state_copies_and_devices():
    searcher, *_ = filled()
    queries = normal(3, TOKENS, D, seed=3)
    expected = searcher(queries)
    assert {name.partition(".")[0] for name in searcher.state_dict()} == {"index"}
    other = MaxSim(IndexIVFFlat(D, nlist=6, nprobe=6, metric="ip"))
    other.load_state_dict(searcher.state_dict())
    file = io.BytesIO()
    torch.save(searcher, file)
    file.seek(0)
    for copied in (other, copy.deepcopy(searcher), torch.load(file, weights_only=False), searcher.to("cpu")):
        same(copied(queries), expected)
    half = copy.deepcopy(searcher).half()
    same(half(queries), loop(*stored(half), queries, 10))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        same(searcher(queries), expected)
    same(searcher(queries.double()), expected)


def test_wrong_arguments():
    searcher, *_ = filled()
    queries = normal(2, TOKENS, D)
    with pytest.raises(ValueError, match="metric 'ip' or 'cosine', got 'l2'"):
        MaxSim(IndexFlatL2(D))
    with pytest.raises(TypeError, match="index must be a flat index"):
        MaxSim(torch.nn.Linear(2, 2))
    for name in ("k", "candidates", "neighbours"):
        with pytest.raises(ValueError, match=f"{name} must be >= 1"):
            MaxSim(IndexFlatIP(D), **{name: 0})
    with pytest.raises(ValueError, match=r"pass queries\[None\] for one query"):
        searcher(queries[0])
    with pytest.raises(ValueError, match="queries must have shape"):
        searcher(queries[:, :, :3])
    with pytest.raises(TypeError, match="mask must be bool"):
        searcher(queries, torch.ones(2, TOKENS))
    with pytest.raises(ValueError, match="mask must have shape"):
        searcher(queries, torch.ones(2, 3, dtype=torch.bool))
    with pytest.raises(RuntimeError, match=r"torch\.func"):
        torch.func.grad(lambda x: searcher(x)[0].sum())(queries)


# -- graphs ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", INDEXES)
def test_a_graph_of_all_candidates_gives_the_answer_of_the_loop(kind):
    searcher, vectors, documents = filled(kind)
    queries = normal(4, TOKENS, D, seed=3)
    mask = torch.ones(4, TOKENS, dtype=torch.bool)
    mask[1, 2:] = False
    mask[2] = False
    graph = searcher.graph(tokens=TOKENS, candidates=60, nprobe=2)
    same(graph(queries), loop(vectors, documents, queries, 10, searcher.index.metric))
    same(graph(queries, mask), searcher(queries, mask))
    searcher.index.remove_ids(documents[:1])
    with pytest.raises(RuntimeError, match="has changed"):
        graph(queries)


def test_a_graph_of_few_candidates_gives_the_answer_of_the_search():
    searcher, *_ = filled()
    searcher.candidates, searcher.neighbours = 12, 20
    queries = normal(6, TOKENS, D, seed=3)
    expected = searcher.search(queries, 4, params=SearchParams(nprobe=2))
    same(searcher.graph(tokens=TOKENS, k=4, nprobe=2)(queries), expected)


def test_graphs_of_an_empty_index_and_their_arguments():
    graph = MaxSim(IndexFlatIP(D)).graph(tokens=TOKENS)
    scores, ids = graph(normal(2, TOKENS, D))
    assert torch.equal(ids, torch.full((2, 10), -1))
    assert (scores == -torch.inf).all()
    with pytest.raises(ValueError, match=rf"queries must have shape \(n, {TOKENS}, {D}\)"):
        graph(normal(2, 3, D))


def test_gradients_of_a_graph():
    searcher, *_ = filled()
    queries = normal(4, TOKENS, D, seed=3).requires_grad_()
    graph = searcher.graph(tokens=TOKENS, candidates=60)
    found, expected = (torch.autograd.grad(call(queries)[0].sum(), queries)[0] for call in (graph, searcher))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning", "ignore:.*torch.jit:FutureWarning")
def test_a_graph_is_compiled_as_one():
    searcher, *_ = filled()
    graph = searcher.graph(tokens=TOKENS, candidates=20)
    compiled = torch.compile(graph, fullgraph=True, dynamic=True, backend="aot_eager")
    for count in (4, 7):
        queries = normal(count, TOKENS, D, seed=count)
        same(compiled(queries), graph(queries))


@pytest.mark.parametrize("kind", ["ivf ip", "ivf codes"])
@pytest.mark.parametrize("format", ["exported", "onnx"])
def test_model_files(format, kind, tmp_path):
    if format == "onnx":
        pytest.importorskip("onnxscript")
        pytest.importorskip("onnxruntime")
    searcher, *_ = filled(kind)
    graph = searcher.graph(tokens=TOKENS, candidates=20, k=4)
    path = export.FORMATS[format](graph, tmp_path / "model", example=normal(2, TOKENS, D))
    run = export.runner(path, format)
    for count in (1, 5):
        queries = normal(count, TOKENS, D, seed=count)
        same(run(queries), graph(queries))


@pytest.mark.parametrize("nprobe", [1, 4])
@pytest.mark.parametrize(
    ("name", "value"),
    [("exclude", [[0], [1]]), ("selector", torch.ones(2, 3, dtype=torch.bool)), ("selector", [[0], [1]])],
)
def test_filters_of_each_query_are_refused(nprobe: int, name: str, value: object) -> None:
    """An exclusion must not be ignored where all documents are scored."""
    x = torch.randn(160, 4, generator=torch.Generator().manual_seed(0))
    index = IndexIVFFlat(4, nlist=4, metric="ip").train(x)
    index.add_with_ids(x, torch.arange(160) % 3)
    with pytest.raises(ValueError, match=f"^{name} for each query"):
        MaxSim(index).search(x[:8].view(2, 4, 4), 1, params=SearchParams(nprobe=nprobe, **{name: value}))
