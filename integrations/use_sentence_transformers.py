"""sentence-transformers: mine_hard_negatives(use_faiss=True) finds what it finds without faiss; a random model."""

from __future__ import annotations

import faiss
import numpy as np
import pytest
import torch
from datasets import Dataset
from sentence_transformers import SentenceTransformer, models
from sentence_transformers.util import cos_sim, dot_score, mine_hard_negatives, semantic_search
from transformers import BertConfig, BertModel, BertTokenizer

from torch_ivf_module import IndexFlat, IndexFlatL2
from torch_ivf_module.integrations import sentence_transformers as adaptor

WORDS = [f"word{number}" for number in range(60)]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    (folder / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]))
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=5 + len(WORDS), hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64
    )
    BertModel(config).save_pretrained(folder)
    BertTokenizer(str(folder / "vocab.txt")).save_pretrained(folder)
    encoder = models.Transformer(str(folder))
    return SentenceTransformer(modules=[encoder, models.Pooling(32), models.Normalize()], device="cpu")


@pytest.fixture(scope="module")
def pairs():
    rs = np.random.RandomState(0)
    texts = [" ".join(rs.choice(WORDS, 6)) for _ in range(200)]
    return Dataset.from_dict({"anchor": texts[:100], "positive": texts[100:]})


def test_faiss_is_not_here():
    assert faiss.__name__ == "torch_ivf_module.faiss_compat"


@pytest.mark.parametrize("settings", [{"num_negatives": 3}, {"num_negatives": 2, "range_min": 4, "range_max": 30}])
def test_the_same_negatives_with_and_without(model, pairs, settings):
    common = dict(sampling_strategy="top", batch_size=50, verbose=False, **settings)
    found = mine_hard_negatives(pairs, model, use_faiss=True, faiss_batch_size=32, **common)
    expected = mine_hard_negatives(pairs, model, use_faiss=False, **common)
    assert len(found) == len(expected) > 0
    assert found.to_list() == expected.to_list()


# --- the adaptor semantic_search ------------------------------------------------------------------------------------


def same(found, expected):
    for some, others in zip(found, expected, strict=True):
        assert [hit["corpus_id"] for hit in some] == [hit["corpus_id"] for hit in others]
        assert [hit["score"] for hit in some] == pytest.approx([hit["score"] for hit in others], rel=1e-4, abs=1e-5)


@pytest.mark.parametrize("score", [cos_sim, dot_score])
@pytest.mark.parametrize("k", [1, 10, 200])
def test_the_adaptor_finds_what_semantic_search_finds(score, k):
    generator = torch.Generator().manual_seed(0)
    corpus, queries = (torch.randn(n, 32, generator=generator) for n in (150, 7))
    expected = semantic_search(queries, corpus, top_k=k, score_function=score)
    same(adaptor.semantic_search(queries, corpus, top_k=k, score_function=score), expected)
    index = IndexFlat(32, "cosine" if score is cos_sim else "ip")
    index.add(corpus)
    same(adaptor.semantic_search(queries, index, top_k=k), expected)
    same(adaptor.semantic_search(queries[0].numpy(), corpus.numpy(), top_k=k, score_function=score), expected[:1])


def test_the_adaptor_on_embeddings_of_a_model(model, pairs):
    corpus, queries = (model.encode(pairs[name], convert_to_tensor=True) for name in ("positive", "anchor"))
    same(adaptor.semantic_search(queries, corpus, top_k=3), semantic_search(queries, corpus, top_k=3))


def test_what_the_adaptor_refuses():
    index = IndexFlatL2(4)
    with pytest.raises(ValueError, match="metric 'cosine' or 'ip', got one of metric 'l2'"):
        adaptor.semantic_search(torch.ones(1, 4), index)
    with pytest.raises(ValueError, match="an index has its metric"):
        adaptor.semantic_search(torch.ones(1, 4), index, score_function=cos_sim)
    with pytest.raises(ValueError, match="score_function must be cos_sim or dot_score"):
        adaptor.semantic_search(torch.ones(1, 4), torch.ones(1, 4), score_function=torch.cdist)


def test_the_documented_program(documented):
    assert len(documented("sentence-transformers")["hits"][0]) == 5
