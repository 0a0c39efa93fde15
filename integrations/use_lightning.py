"""Lightning: the adaptor KNNAccuracy beside votes that are counted by a loop."""

from __future__ import annotations

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from torch.utils.data import DataLoader, TensorDataset

from torch_ivf_module import IndexFlatL2, IndexIVFFlat
from torch_ivf_module.integrations.lightning import KNNAccuracy

GENERATOR = torch.Generator().manual_seed(0)
LABELS = torch.arange(400) % 10
X = torch.randn(10, 8, generator=GENERATOR)[LABELS] + torch.randn(400, 8, generator=GENERATOR)
KNOWN, TEST = TensorDataset(X[:300], LABELS[:300]), TensorDataset(X[300:], LABELS[300:])
QUIET = dict(
    accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False
)


class Encoder(LightningModule):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layer = torch.nn.Linear(8, 6)

    def forward(self, x):
        return self.layer(x)

    def training_step(self, batch, number):
        return self(batch[0]).square().mean()

    def validation_step(self, batch, number):
        pass

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)


def share_right(module, k=20, temperature=0.07):
    """The evaluation of DINO, sample by sample."""
    with torch.no_grad():
        known, test = (torch.nn.functional.normalize(module(x)) for x in (X[:300], X[300:]))
    right = 0
    for z, label in zip(test, LABELS[300:], strict=True):
        similar, at = (known @ z).topk(k)
        votes = torch.zeros(10).index_add(0, LABELS[:300][at], (similar / temperature).exp())
        right += int(votes.argmax() == label)
    return right / 100


@pytest.mark.parametrize("index", [None, lambda d: IndexIVFFlat(d, nlist=4, nprobe=4, metric="cosine")])
def test_the_accuracy_is_that_of_the_trained_module(index):
    callback, module = KNNAccuracy(DataLoader(KNOWN, 70), index=index), Encoder()
    trainer = Trainer(max_epochs=2, callbacks=[callback], **QUIET)
    trainer.fit(module, DataLoader(KNOWN, 50), DataLoader(TEST, 30))
    assert trainer.callback_metrics["knn_accuracy"].item() == pytest.approx(share_right(module))
    assert callback.index.ntotal == len(callback.labels) == 300
    (logged,) = trainer.validate(module, DataLoader(TEST, 100), verbose=False)
    assert logged["knn_accuracy"] == pytest.approx(share_right(module))


def test_another_embedding_and_name():
    callback = KNNAccuracy(DataLoader(KNOWN, 100), embed=lambda module, x: x, name="raw", k=5)
    trainer = Trainer(callbacks=[callback], **QUIET)
    (logged,) = trainer.validate(Encoder(), DataLoader(TEST, 100), verbose=False)
    assert logged["raw"] == pytest.approx(share_right(lambda x: x, k=5))


def test_what_cannot_be_is_refused():
    with pytest.raises(ValueError, match="metric 'cosine', got metric 'l2'"):
        KNNAccuracy(DataLoader(KNOWN, 100), index=IndexFlatL2).fill(Encoder())
    with pytest.raises(RuntimeError, match="no index yet"):
        KNNAccuracy(DataLoader(KNOWN, 100)).classify(Encoder(), X)


def test_the_documented_program(documented):
    assert documented("Lightning")["trainer"].callback_metrics["knn_accuracy"] > 0.9
