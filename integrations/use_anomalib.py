"""anomalib: PatchCore with an index beside its own memory bank, on the photographs of scikit-learn."""

from __future__ import annotations

import copy
import pickle

import numpy as np
import onnxruntime
import pytest
import torch
from anomalib.data import Folder
from anomalib.engine import Engine
from anomalib.models import Patchcore
from anomalib.models.image.patchcore.torch_model import PatchcoreModel
from PIL import Image
from sklearn.datasets import load_sample_images

from torch_ivf_module import IndexFlatIP, IndexFlatL2, IndexIVFFlat, IndexScalarQuantizer
from torch_ivf_module.integrations.anomalib import with_index

CLOSE = dict(rtol=1e-4, atol=1e-4)
GOOD, OTHER = (torch.tensor(image).permute(2, 0, 1) / 255 for image in load_sample_images().images)
WINDOWS = torch.stack([GOOD[:, r : r + 128, c : c + 128] for r in (0, 150, 299) for c in (0, 250, 512)])
ODD = GOOD[:, 30:158, 102:230].repeat(3, 1, 1, 1)
ODD[1:, :, 40:90, 40:90] = OTHER[:, 200:250, 300:350]


def new(**settings):
    torch.manual_seed(0)
    return PatchcoreModel(["layer2", "layer3"], "resnet18", pre_trained=False, **settings)


def fitted(model):
    model.train()
    model.feature_extractor.eval()
    model(WINDOWS)
    np.random.seed(0)  # noqa: NPY002  which anomalib's coreset starts from
    torch.manual_seed(0)
    model.subsample_embedding(0.2)
    return model.eval()


@pytest.fixture(scope="module")
def own():
    return fitted(new())


def same(found, expected):
    torch.testing.assert_close(found.pred_score, expected.pred_score, **CLOSE)
    torch.testing.assert_close(found.anomaly_map, expected.anomaly_map, **CLOSE)


@pytest.mark.parametrize("neighbours", [1, 9])
def test_fitted_as_anomalib_does(neighbours):
    own, ours = fitted(new(num_neighbors=neighbours)), fitted(with_index(new(num_neighbors=neighbours)))
    assert type(ours.memory_bank.index) is IndexFlatL2
    assert ours.memory_bank.shape == own.memory_bank.shape
    assert torch.equal(ours.memory_bank[torch.arange(9)], own.memory_bank[:9])
    same(ours(ODD), own(ODD))
    assert ours(ODD).pred_score.argmin() == 0


@pytest.mark.parametrize("index", [IndexFlatL2, lambda d: IndexIVFFlat(d, nlist=8, nprobe=8)])
def test_a_fitted_model_keeps_its_bank(own, index):
    ours = with_index(copy.deepcopy(own), index)
    assert isinstance(ours, PatchcoreModel)
    same(ours(ODD), own(ODD))
    same(pickle.loads(pickle.dumps(ours))(ODD), own(ODD))


def test_codes(own):
    ours = with_index(copy.deepcopy(own), IndexScalarQuantizer)
    torch.testing.assert_close(ours(ODD).pred_score, own(ODD).pred_score, rtol=0.01, atol=0)


def test_checkpoints_of_both_kinds(own):
    ours, again = with_index(new()).eval(), with_index(new()).eval()
    ours.load_state_dict(own.state_dict())
    same(ours(ODD), own(ODD))
    again.load_state_dict(ours.state_dict())
    assert torch.equal(again(ODD).anomaly_map, ours(ODD).anomaly_map)
    ours.load_state_dict(new().state_dict())
    assert ours.memory_bank.size(0) == 0
    with pytest.raises(ValueError, match="Memory bank is empty"):
        ours(ODD)


@pytest.mark.parametrize("index", [IndexFlatL2, lambda d: IndexIVFFlat(d, nlist=8, nprobe=8)])
def test_the_whole_model_in_one_onnx_file(own, index, tmp_path):
    model = Patchcore("resnet18", pre_trained=False, evaluator=False, visualizer=False)
    model.model = with_index(copy.deepcopy(own), index)
    model.eval()
    file = model.to_onnx(tmp_path, input_size=(128, 128), external_data=False)
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == [file]
    session = onnxruntime.InferenceSession(file)
    found = session.run(["pred_score", "anomaly_map"], {session.get_inputs()[0].name: ODD[:1].numpy()})
    expected = model(ODD[:1])
    torch.testing.assert_close(torch.from_numpy(found[0]), expected.pred_score, **CLOSE)
    torch.testing.assert_close(torch.from_numpy(found[1]), expected.anomaly_map, **CLOSE)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pictures")
    odd = WINDOWS.clone()
    odd[:, :, 40:90, 40:90] = OTHER[:, 200:250, 300:350]
    for name, images in (("good", WINDOWS), ("odd", odd)):
        folder.joinpath(name).mkdir()
        for number, image in enumerate(images):
            picture = Image.fromarray((image.permute(1, 2, 0) * 255).byte().numpy())
            picture.save(folder / name / f"{number}.png")
    return folder


def scores(model, pictures, folder, checkpoint=None):
    """The score of each test picture by an Engine, which first fits the model or loads a checkpoint."""
    data = dict(root=pictures, normal_dir="good", abnormal_dir="odd", train_batch_size=4, eval_batch_size=4, seed=0)
    photographs = Folder("photographs", num_workers=0, **data)
    engine = Engine(default_root_dir=folder, accelerator="cpu", logger=False, enable_progress_bar=False)
    if checkpoint is None:
        np.random.seed(0)  # noqa: NPY002
        torch.manual_seed(0)
        engine.fit(model, datamodule=photographs)
    found = engine.predict(model, datamodule=photographs, ckpt_path=checkpoint)
    return torch.cat([batch.pred_score for batch in found])


def test_an_engine_fits_saves_and_loads(pictures, tmp_path):
    def patchcore():
        torch.manual_seed(0)
        size = Patchcore.configure_pre_processor((64, 64))
        return Patchcore("resnet18", pre_trained=False, pre_processor=size, evaluator=False, visualizer=False)

    expected = scores(patchcore(), pictures, tmp_path / "own")
    found = scores(with_index(patchcore()), pictures, tmp_path / "ours")
    torch.testing.assert_close(found, expected, **CLOSE)
    assert len(expected.unique()) > 3  # a PostProcessor limits scores to 0…1
    for made in ("own", "ours"):
        (checkpoint,) = (tmp_path / made).rglob("*.ckpt")
        loaded = scores(with_index(patchcore()), pictures, tmp_path / "again", checkpoint)
        torch.testing.assert_close(loaded, expected, **CLOSE)


def test_what_cannot_be_is_refused(own):
    with pytest.raises(TypeError, match="must be anomalib's Patchcore or PatchcoreModel, got Linear"):
        with_index(torch.nn.Linear(1, 1))
    model = copy.deepcopy(own)
    with pytest.raises(ValueError, match="of metric 'l2'"):
        with_index(model, IndexFlatIP)
    same(model(ODD), own(ODD))
    with pytest.raises(ValueError, match="no embeddings to choose from"):
        with_index(model).subsample_embedding(0.1)


def test_the_documented_program(documented):
    names = documented("anomalib")
    assert names["found"].pred_score.shape == (3,)
    assert names["found"].anomaly_map.shape == (3, 1, 128, 128)
