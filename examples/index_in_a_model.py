# %% [markdown]
"""
An index as a layer: an encoder and the vectors it is searched against travel in one state_dict.

    python examples/index_in_a_model.py
"""

# %%
import torch
from torch import nn

from torch_ivf_module import IndexIVFFlat


# %%
class Retriever(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 32))
        self.index = IndexIVFFlat(32, nlist=64, nprobe=8, metric="cosine", k=5)

    def forward(self, x):
        return self.index(self.encoder(x))  # scores (..., 5), ids (..., 5)


# %%
def main() -> None:
    torch.manual_seed(0)
    model, items = Retriever().eval(), torch.randn(10_000, 64)
    with torch.no_grad():
        vectors = model.encoder(items)
    model.index.fit(vectors).add(vectors)

    twin = Retriever().eval()  # its index is empty and untrained until the next line
    twin.load_state_dict(model.state_dict())
    assert torch.equal(model(items[:100])[1], twin(items[:100])[1])

    scores, ids = twin(items[:3])
    print(f"the twin holds {twin.index.ntotal:,} vectors; nearest to items 0, 1, 2, with their cosines:")
    for n, (best, near) in enumerate(zip(scores.tolist(), ids.tolist(), strict=True)):
        print(f"  {n}: " + "  ".join(f"{i} ({s:.3f})" for i, s in zip(near, best, strict=True)))


# %%
if __name__ == "__main__":
    main()
