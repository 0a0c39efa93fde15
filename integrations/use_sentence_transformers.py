"""sentence-transformers: mine_hard_negatives(use_faiss=True) finds what it finds without faiss; a random model."""

from __future__ import annotations

import faiss
import numpy as np
import pytest
import torch
from datasets import Dataset
from sentence_transformers import SentenceTransformer, models
from sentence_transformers.util import mine_hard_negatives
from transformers import BertConfig, BertModel, BertTokenizer

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
