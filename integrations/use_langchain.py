"""langchain-community's FAISS store, by the standard suite of langchain-tests, and its files, merges and deletions."""

from __future__ import annotations

import doctest

import faiss
import numpy as np
import pytest
import torch
from langchain_community.docstore.in_memory import InMemoryDocstore
from langchain_community.vectorstores import FAISS
from langchain_community.vectorstores.utils import DistanceStrategy
from langchain_core.documents import Document
from langchain_core.embeddings import DeterministicFakeEmbedding
from langchain_core.vectorstores import InMemoryVectorStore
from langchain_tests.integration_tests.vectorstores import EMBEDDING_SIZE, VectorStoreIntegrationTests

from torch_ivf_module import IndexFlat, IndexIVFFlat, load
from torch_ivf_module.integrations import langchain as adaptor
from torch_ivf_module.integrations.langchain import IndexVectorStore

TEXTS = [f"text {number}" for number in range(40)]
EMBEDDING = DeterministicFakeEmbedding(size=16)


# With faiss itself these six fail with the same errors, from the store's docstore, before an index is asked.
refused = pytest.mark.xfail(
    strict=True, raises=ValueError, reason="the store refuses known ids in add and unknown ones in delete"
)


class TestStandard(VectorStoreIntegrationTests):
    """The suite as it is, but for what langchain-community's store does otherwise."""

    @pytest.fixture
    def vectorstore(self):
        index = faiss.IndexFlatL2(EMBEDDING_SIZE)
        return FAISS(self.get_embeddings(), index, InMemoryDocstore(), {})

    @refused
    def test_delete_missing_content(self, vectorstore):
        super().test_delete_missing_content(vectorstore)

    @refused
    def test_add_documents_with_ids_is_idempotent(self, vectorstore):
        super().test_add_documents_with_ids_is_idempotent(vectorstore)

    @refused
    def test_add_documents_by_id_with_mutation(self, vectorstore):
        super().test_add_documents_by_id_with_mutation(vectorstore)

    @refused
    async def test_delete_missing_content_async(self, vectorstore):
        await super().test_delete_missing_content_async(vectorstore)

    @refused
    async def test_add_documents_with_ids_is_idempotent_async(self, vectorstore):
        await super().test_add_documents_with_ids_is_idempotent_async(vectorstore)

    @refused
    async def test_add_documents_by_id_with_mutation_async(self, vectorstore):
        await super().test_add_documents_by_id_with_mutation_async(vectorstore)


def test_faiss_is_not_here():
    assert faiss.__name__ == "torch_ivf_module.faiss_compat"


@pytest.mark.parametrize("strategy", [DistanceStrategy.EUCLIDEAN_DISTANCE, DistanceStrategy.MAX_INNER_PRODUCT])
def test_nearest_texts(strategy):
    store = FAISS.from_texts(TEXTS, EMBEDDING, distance_strategy=strategy)
    x, query = np.array(EMBEDDING.embed_documents(TEXTS)), np.array(EMBEDDING.embed_query("a question"))
    scores = x @ query if strategy == DistanceStrategy.MAX_INNER_PRODUCT else -((x - query) ** 2).sum(1)
    expected = [TEXTS[at] for at in np.argsort(-scores)[:4]]
    assert [found.page_content for found in store.similarity_search("a question", k=4)] == expected
    assert len(store.max_marginal_relevance_search("a question", k=3, fetch_k=10)) == 3


def test_normalised_vectors():
    store = FAISS.from_texts(TEXTS, EMBEDDING, normalize_L2=True)
    found, score = store.similarity_search_with_score(TEXTS[3], k=1)[0]
    assert (found.page_content, round(float(score), 4)) == (TEXTS[3], 0)


def test_save_load_merge_delete(tmp_path):
    store = FAISS.from_texts(TEXTS[:20], EMBEDDING, ids=TEXTS[:20])
    store.save_local(str(tmp_path))
    again = FAISS.load_local(str(tmp_path), EMBEDDING, allow_dangerous_deserialization=True)
    again.merge_from(FAISS.from_texts(TEXTS[20:], EMBEDDING, ids=TEXTS[20:]))
    assert again.delete(TEXTS[:10])
    for text in TEXTS[10:]:
        assert again.similarity_search(text, k=1)[0].page_content == text
    assert again.similarity_search(TEXTS[0], k=1)[0].page_content != TEXTS[0]
    data = again.serialize_to_bytes()
    third = FAISS.deserialize_from_bytes(data, EMBEDDING, allow_dangerous_deserialization=True)
    assert third.index.ntotal == 30


# --- the adaptor IndexVectorStore -----------------------------------------------------------------------------------


class TestAdaptor(VectorStoreIntegrationTests):
    """The whole suite, nothing left out."""

    @pytest.fixture
    def vectorstore(self):
        return IndexVectorStore(self.get_embeddings())


class TestAdaptorWithLists(VectorStoreIntegrationTests):
    """The whole suite on an IndexIVFFlat."""

    @pytest.fixture
    def vectorstore(self):
        index = IndexIVFFlat(EMBEDDING_SIZE, nlist=4, nprobe=4, metric="cosine")
        return IndexVectorStore(self.get_embeddings(), index.fit(torch.randn(400, EMBEDDING_SIZE)))


@pytest.mark.parametrize("metric", ["cosine", "ip", "l2"])
def test_nearest_texts_of_the_adaptor(metric):
    store = IndexVectorStore.from_texts(TEXTS, EMBEDDING, index=IndexFlat(16, metric))
    x, query = np.array(EMBEDDING.embed_documents(TEXTS)), np.array(EMBEDDING.embed_query("a question"))
    cosines = x @ query / np.linalg.norm(x, axis=1) / np.linalg.norm(query)
    scores = {"cosine": cosines, "ip": x @ query, "l2": ((x - query) ** 2).sum(1)}[metric]
    order = np.argsort(scores if metric == "l2" else -scores)[:4]
    found = store.similarity_search_with_score("a question", k=4)
    assert [document.page_content for document, _ in found] == [TEXTS[at] for at in order]
    assert [score for _, score in found] == pytest.approx(scores[order].tolist(), rel=1e-4)
    assert store.similarity_search_by_vector(query.tolist(), k=4) == [document for document, _ in found]


def test_filters_and_relevance_of_the_adaptor():
    store = IndexVectorStore.from_texts(TEXTS, EMBEDDING, [{"number": number} for number in range(40)])
    found = store.similarity_search("text 3", k=50, filter=lambda document: document.metadata["number"] % 2 == 0)
    assert sorted(document.metadata["number"] for document in found) == list(range(0, 40, 2))
    assert store.similarity_search("text 3", filter=lambda document: False) == []
    (best,) = store.similarity_search_with_relevance_scores("text 3", k=1)
    assert (best[0].page_content, round(best[1], 4)) == ("text 3", 1)
    retriever = store.as_retriever(search_type="mmr", search_kwargs={"k": 3, "fetch_k": 10})
    assert retriever.invoke("text 3")[0].page_content == "text 3"
    memory = InMemoryVectorStore.from_texts(TEXTS, EMBEDDING)
    ours, theirs = (part.max_marginal_relevance_search("a question", k=5, fetch_k=20) for part in (store, memory))
    assert [document.page_content for document in ours] == [document.page_content for document in theirs]


def test_changes_and_files_of_the_adaptor(tmp_path):
    store = IndexVectorStore.from_texts(TEXTS, EMBEDDING, ids=TEXTS)
    assert store.add_texts(["new", "newer", "newest"], ids=["text 1", "text 1", None])[:2] == ["text 1"] * 2
    assert store.index.ntotal == 41
    assert store.get_by_ids(["text 1", "no such id"]) == [Document(id="text 1", page_content="newer")]
    assert store.similarity_search("newer", k=1)[0].id == "text 1"
    store.delete(["text 2", "no such id"])
    store.save(tmp_path)
    again = IndexVectorStore.load(tmp_path, EMBEDDING)
    assert again.similarity_search("text 5", k=40) == store.similarity_search("text 5", k=40)
    again.add_texts(["text 2"])
    assert again.similarity_search("text 2", k=1)[0].page_content == "text 2"
    again.delete()
    assert again.similarity_search("text 2") == []
    assert again.index.ntotal == 0


def test_the_example_of_the_adaptor():
    assert doctest.testmod(adaptor) == (0, 3)


def test_what_the_adaptor_refuses(tmp_path):
    store = IndexVectorStore(EMBEDDING)
    with pytest.raises(ValueError, match="got 2 texts, but 2 metadatas and 1 ids"):
        store.add_texts(["a", "b"], ids=["1"])
    with pytest.raises(ValueError, match="nothing to save"):
        store.save(tmp_path)
    store.add_texts(TEXTS)
    with pytest.raises(ValueError, match="must be empty, got one of 40 vectors"):
        IndexVectorStore(EMBEDDING, store.index)
    with pytest.raises(ValueError, match="training 4 lists needs at least 4"):
        IndexVectorStore.from_texts(["a"], EMBEDDING, index=IndexIVFFlat(16, nlist=4, metric="cosine"))
    store.save(tmp_path)
    index = load(tmp_path / "index.pt")
    index.remove_ids(torch.tensor([0]))
    index.save(tmp_path / "index.pt")
    with pytest.raises(ValueError, match="not of the same save"):
        IndexVectorStore.load(tmp_path, EMBEDDING)


def test_the_documented_program(documented):
    names = documented("LangChain")
    assert names["document"].page_content == "text 7"
    assert names["store"].index.nlist == 16
