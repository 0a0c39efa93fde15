# %% [markdown]
"""
A kNN classifier trained end to end: the encoder learns from the distances its own index returns.

    python examples/knn_head.py [--epochs N]

Handwritten digits (scikit-learn) are encoded into an index, and a digit is classified by the labels of its nearest
neighbours, weighted by softmax(-D). D is differentiable in the query, so the loss reaches the encoder through the
search; after each epoch the index is filled again with what the encoder has become. Needs the extra `demo`.

Method: the loss of neighbourhood components analysis (Goldberger et al., NIPS 2004), cut to k neighbours.
"""

# %%
import argparse
import sys
from collections.abc import Sequence

import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import nn

from torch_ivf_module import IndexIVFFlat

CLASSES = 10


# %%
class Classifier(nn.Module):
    """Digits (n, 64) to log-probabilities of their classes (n, 10)."""

    def __init__(self, d: int = 16, k: int = 10) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, d))
        self.index = IndexIVFFlat(d, nlist=16, nprobe=8, k=k)
        self.register_buffer("labels", torch.empty(0, dtype=torch.int64))

    @torch.no_grad()
    def remember(self, x, labels):
        """Fill the index with what the encoder now makes of x."""
        vectors = self.encoder(x)
        self.index.reset()
        self.index.fit(vectors, niter=5).add_with_ids(vectors, torch.arange(len(x)))
        self.labels = labels

    def forward(self, x, own=None):
        """`own` (n,) are the rows of x in the index, which may not vote for themselves."""
        distances, ids = self.index.search(self.encoder(x), self.index.k + (own is not None))
        absent = ids < 0 if own is None else (ids < 0) | (ids == own[:, None])
        weights = torch.softmax((-distances).masked_fill(absent, -torch.inf), dim=1)
        votes = nn.functional.one_hot(self.labels[ids.clamp(min=0)], CLASSES)
        return (weights[:, :, None] * votes).sum(1).clamp(min=1e-6).log()


# %%
def main(argv: Sequence[str] = ()) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=10)
    epochs = parser.parse_args(argv).epochs
    torch.manual_seed(0)
    digits = load_digits()
    parts = train_test_split(digits.data / 16, digits.target, test_size=500, random_state=0, stratify=digits.target)
    x, test_x = (torch.tensor(part, dtype=torch.float32) for part in parts[:2])
    y, test_y = (torch.tensor(part) for part in parts[2:])

    model = Classifier()
    model.remember(x, y)
    print(f"before training: {accuracy(model, test_x, test_y):.1%} of {len(test_x)} test digits right")
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
    for epoch in range(1, epochs + 1):
        total = 0.0
        for rows in torch.randperm(len(x)).split(64):
            loss = nn.functional.nll_loss(model(x[rows], own=rows), y[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            total += loss.item() * len(rows)
        model.remember(x, y)
        print(f"epoch {epoch:2}: loss {total / len(x):.3f}, {accuracy(model, test_x, test_y):.1%} right")


@torch.no_grad()
def accuracy(model, x, y) -> float:
    return (model(x).argmax(1) == y).float().mean().item()


# %%
if __name__ == "__main__":
    main(sys.argv[1:])
