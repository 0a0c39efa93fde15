"""A LangChain vector store over an index (extra `langchain`).

n texts, d dim, k results.
"""

from __future__ import annotations

import json
import os
import uuid
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch

from .. import checkpoint
from .._files import replace
from .._optional import require
from ..index import IndexFlat
from ..index.base import IndexBase
from ..params import SearchParams

__all__ = ["IndexVectorStore"]

_stores: Any = require("langchain_core.vectorstores", "langchain")
_utils: Any = require("langchain_core.vectorstores.utils", "langchain")
Document: Any = require("langchain_core.documents", "langchain").Document
Filter = Callable[[Any], bool]
INDEX, DOCUMENTS = "index.pt", "documents.json"


class IndexVectorStore(_stores.VectorStore):  # type: ignore[misc]
    """A vector store of texts, whose vectors are in an index of this package.

    Parameters
    ----------
    embedding : LangChain's `Embeddings`.
    index : an empty index; None for an `IndexFlat` with metric "cosine". An untrained index with lists is trained on
        the first texts that are added, which must be at least as many as `train` needs.

    A text with a known id replaces the old text. Unknown ids in `delete` are ignored. Scores are those of the index:
    larger is better for "cosine" and "ip"; for "l2" they are squared distances. `filter` is a function of a Document,
    as in LangChain's InMemoryVectorStore; it is called for every document.

    >>> from langchain_core.embeddings import DeterministicFakeEmbedding
    >>> store = IndexVectorStore.from_texts(["one", "two"], DeterministicFakeEmbedding(size=8), ids=["1", "2"])
    >>> store.similarity_search("two", k=1)
    [Document(id='2', metadata={}, page_content='two')]
    """

    def __init__(self, embedding: Any, index: IndexBase | None = None) -> None:
        if index is not None and index.ntotal:
            raise ValueError(f"index must be empty, got one with {index.ntotal} vectors: their texts are not known")
        self.embedding = embedding
        self.index = index
        self._documents: dict[int, Any] = {}  # by their ids in the index
        self._numbers: dict[str, int] = {}  # these ids by the ids of the documents

    @property
    def embeddings(self) -> Any:
        """The embedding."""
        return self.embedding

    def add_texts(
        self,
        texts: Iterable[str],
        metadatas: list[dict[str, Any]] | None = None,
        *,
        ids: Sequence[str | None] | None = None,
        **_: Any,
    ) -> list[str]:
        """Add n texts, with n metadatas and n ids if given. Returns the ids; an id of None is replaced by a new one."""
        texts = list(texts)
        metadatas = metadatas or [{} for _ in texts]
        names = [id or str(uuid.uuid4()) for id in ids or [None] * len(texts)]
        if not len(texts) == len(metadatas) == len(names):
            raise ValueError(f"got {len(texts)} texts, but {len(metadatas)} metadatas and {len(names)} ids")
        documents = {
            name: Document(id=name, page_content=text, metadata=metadata)
            for name, text, metadata in zip(names, texts, metadatas, strict=True)
        }
        if documents:
            self._add(documents)
        return names

    def _add(self, documents: dict[str, Any]) -> None:
        vectors = torch.tensor(self.embedding.embed_documents([item.page_content for item in documents.values()]))
        if self.index is None:
            self.index = IndexFlat(vectors.shape[1], "cosine")
        vectors = vectors.to(self.index.device)
        if not self.index.is_trained:
            self.index.train(vectors)
        first = max(self._documents, default=-1) + 1
        numbers = range(first, first + len(documents))
        self.index.add_with_ids(vectors, torch.arange(numbers.start, numbers.stop, device=vectors.device))
        self.delete(list(documents))  # what had these ids before
        self._documents.update(zip(numbers, documents.values(), strict=True))
        self._numbers.update(zip(documents, numbers, strict=True))

    def delete(self, ids: Sequence[str] | None = None, **_: Any) -> bool:
        """Delete the texts of these ids, or all for None. Returns True."""
        gone = [self._numbers.pop(id) for id in (list(self._numbers) if ids is None else ids) if id in self._numbers]
        for number in gone:
            del self._documents[number]
        if gone and self.index is not None:
            self.index.remove_ids(torch.tensor(gone, device=self.index.device))
        return True

    def get_by_ids(self, ids: Sequence[str], /) -> list[Any]:
        """The documents with these ids; unknown ids are ignored."""
        return [self._documents[self._numbers[id]] for id in ids if id in self._numbers]

    def similarity_search(self, query: str, k: int = 4, **settings: Any) -> list[Any]:
        """The k documents nearest to a text; of `settings`, `filter` is used."""
        return [document for document, _ in self.similarity_search_with_score(query, k, **settings)]

    def similarity_search_with_score(self, query: str, k: int = 4, **settings: Any) -> list[tuple[Any, float]]:
        """The k documents nearest to a text, and the score of each."""
        return self.similarity_search_with_score_by_vector(self.embedding.embed_query(query), k, **settings)

    def similarity_search_by_vector(self, embedding: list[float], k: int = 4, **settings: Any) -> list[Any]:
        """The k documents nearest to a vector of d numbers."""
        return [document for document, _ in self.similarity_search_with_score_by_vector(embedding, k, **settings)]

    def similarity_search_with_score_by_vector(
        self, embedding: list[float], k: int = 4, *, filter: Filter | None = None, **_: Any
    ) -> list[tuple[Any, float]]:
        """The k documents nearest to a vector of d numbers, and the score of each."""
        scores, numbers = self._nearest(embedding, k, filter)
        return [(self._documents[number], score) for score, number in zip(scores, numbers, strict=True)]

    def max_marginal_relevance_search(self, query: str, k: int = 4, **settings: Any) -> list[Any]:
        """As `max_marginal_relevance_search_by_vector`, for a text."""
        return self.max_marginal_relevance_search_by_vector(self.embedding.embed_query(query), k, **settings)

    def max_marginal_relevance_search_by_vector(
        self,
        embedding: list[float],
        k: int = 4,
        fetch_k: int = 20,
        lambda_mult: float = 0.5,
        *,
        filter: Filter | None = None,
        **_: Any,
    ) -> list[Any]:
        """k of the `fetch_k` documents nearest to a vector, chosen to differ from one another."""
        numbers = self._nearest(embedding, fetch_k, filter)[1]
        if self.index is None or not numbers:
            return []
        vectors = self.index.reconstruct_batch(torch.tensor(numbers, device=self.index.device)).float().cpu().numpy()
        query = torch.tensor(embedding).numpy()
        chosen = _utils.maximal_marginal_relevance(query, list(vectors), lambda_mult=lambda_mult, k=k)
        return [self._documents[numbers[at]] for at in chosen]

    def _nearest(self, embedding: list[float], k: int, filter: Filter | None) -> tuple[list[float], list[int]]:
        if self.index is None or not self._documents:
            return [], []
        params = None
        if filter is not None:
            allowed = [number for number, document in self._documents.items() if filter(document)]
            params = SearchParams(selector=torch.tensor(allowed, dtype=torch.int64, device=self.index.device))
        D, I = self.index.search(torch.tensor([embedding], device=self.index.device), k, params=params)
        found = I[0] != -1
        return D[0][found].tolist(), I[0][found].tolist()

    def _select_relevance_score_fn(self) -> Callable[[float], float]:
        if self.index is not None and self.index.metric != "cosine":
            raise NotImplementedError(f"relevance scores need metric 'cosine', the index has {self.index.metric!r}")
        return lambda score: score

    @classmethod
    def from_texts(
        cls, texts: list[str], embedding: Any, metadatas: list[dict[str, Any]] | None = None, **settings: Any
    ) -> IndexVectorStore:
        """A store of these texts; of `settings`, `ids` and `index` are used."""
        store = cls(embedding, settings.get("index"))
        store.add_texts(texts, metadatas, ids=settings.get("ids"))
        return store

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write the index and, as JSON, the documents into a folder."""
        if self.index is None:
            raise ValueError("there is nothing to save: no text has been added yet")
        texts = {number: [item.id, item.page_content, item.metadata] for number, item in self._documents.items()}
        written = json.dumps(texts).encode()
        Path(folder).mkdir(parents=True, exist_ok=True)
        checkpoint.save(self.index, Path(folder, INDEX))
        replace(Path(folder, DOCUMENTS), lambda part: _write(part, written))

    @classmethod
    def load(cls, folder: str | os.PathLike[str], embedding: Any) -> IndexVectorStore:
        """The store that `save` wrote. ValueError if the index and the documents are not of the same save."""
        store = cls(embedding)
        index: Any = checkpoint.load(Path(folder, INDEX))
        store.index = index
        for number, (name, text, metadata) in json.loads(Path(folder, DOCUMENTS).read_text(encoding="utf-8")).items():
            store._documents[int(number)] = Document(id=name, page_content=text, metadata=metadata)
            store._numbers[name] = int(number)
        if sorted(store._documents) != sorted(index.list_ids.tolist()):
            raise ValueError(f"{DOCUMENTS} in {os.fspath(folder)} is not of the same save as {INDEX}: save again")
        return store


def _write(path: str, content: bytes) -> None:
    Path(path).write_bytes(content)
