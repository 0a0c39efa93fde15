# %% [markdown]
"""
Find what does not belong in a picture, in the manner of PatchCore, with one ONNX file that searches inside.

    python examples/anomaly_detector.py [--out FOLDER]

Small patches of a good photograph go into an index, thinned out to a coreset as PatchCore does. A patch of a new
picture is as odd as it is far from the nearest stored one, and those distances are the heat map. Encoder and index
are one module, exported as one ONNX file and run by onnxruntime. Needs the extras `export` and `demo`.

Method: Roth et al., "Towards Total Recall in Industrial Anomaly Detection", CVPR 2022; here with random projections
of raw patches in place of a pretrained network's features, so that nothing has to be downloaded.
"""

# %%
import argparse
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import nn

from torch_ivf_module import IndexIVFFlat, export

PATCH, STRIDE, FEATURES, CORESET = 8, 4, 48, 1_500
CROP = 256
WHERE = slice(96, 128), slice(160, 192)  # rows and columns of the defect


# %%
class Features(nn.Module):
    """Images (B, 3, H, W) in 0…1 to features of their patches (B, h, w, FEATURES)."""

    def __init__(self) -> None:
        super().__init__()
        self.project = nn.Conv2d(3, FEATURES, PATCH, STRIDE, bias=False)
        self.project.requires_grad_(False)
        nn.init.orthogonal_(self.project.weight)

    def forward(self, images):
        return self.project(images).permute(0, 2, 3, 1)


class Detector(nn.Module):
    """Images to heat maps (B, h, w): the distance of each patch to the nearest one known."""

    def __init__(self, features: Features, memory: nn.Module) -> None:
        super().__init__()
        self.features, self.memory = features, memory

    def forward(self, images):
        distances, _ = self.memory(self.features(images))
        return distances[..., 0].sqrt()


# %%
def coreset(x: torch.Tensor, size: int) -> torch.Tensor:
    """`size` rows of x (n, d) that cover it: each is the one farthest from those before (greedy k-center)."""
    chosen = torch.zeros(size, dtype=torch.int64)
    nearest = (x - x[0]).square().sum(1)
    for i in range(1, size):
        chosen[i] = nearest.argmax()
        nearest = torch.minimum(nearest, (x - x[chosen[i]]).square().sum(1))
    return x[chosen]


# %%
def pictures() -> tuple[torch.Tensor, torch.Tensor]:
    """A good photograph (1, 3, H, W), and a window of it into which a piece of another photograph was pasted."""
    from sklearn.datasets import load_sample_images

    good, other = (torch.tensor(image).permute(2, 0, 1)[None] / 255 for image in load_sample_images().images)
    bad = good[:, :, 30 : 30 + CROP, 102 : 102 + CROP].clone()  # not on the grid of the stored patches
    bad[:, :, WHERE[0], WHERE[1]] = other[:, :, 200:232, 300:332]
    return good, bad


# %%
def main(argv: Sequence[str] = ()) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("."), help="folder for the ONNX file and the heat map")
    folder = parser.parse_args(argv).out
    torch.manual_seed(0)
    good, bad = pictures()
    features = Features()
    known = coreset(features(good).flatten(0, 2), CORESET)
    index = IndexIVFFlat(FEATURES, nlist=32, nprobe=4, k=1)
    index.train(known).add(known)

    detector = Detector(features, index.graph()).eval()
    file = folder / "anomaly_detector.onnx"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        export.to_onnx(detector, file, example=bad.repeat(2, 1, 1, 1))
    print(f"wrote {file}: {file.stat().st_size / 2**20:.1f} MiB, {index.ntotal:,} patches inside")

    (heat,) = export.runner(file, "onnx")(bad)  # the file alone: neither the detector nor the index
    print(f"largest difference from PyTorch: {(heat - detector(bad)).abs().max().item():.1e}")
    score, there = draw(bad[0], heat[0].numpy(), folder / "anomaly_heat_map.png")
    print(f"oddest patch {score:.1f} times the median, {'inside' if there else 'OUTSIDE'} the pasted piece")
    print(f"wrote {folder / 'anomaly_heat_map.png'}")


# %%
def draw(image: torch.Tensor, heat: np.ndarray, path: Path) -> tuple[float, bool]:
    """Write picture and heat map side by side; say how odd the oddest patch is, and whether it lies in the defect."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    left.imshow(image.permute(1, 2, 0).numpy())
    left.set_title("a photograph with a piece of another one")
    height, width = image.shape[1:]
    shown = right.imshow(heat, extent=(0, width, height, 0), cmap="inferno", interpolation="bilinear")
    right.set_title("distance to the nearest known patch")
    figure.colorbar(shown, ax=right)
    for axes in (left, right):
        axes.add_patch(frame())
        axes.set_axis_off()
    figure.savefig(path, dpi=110)
    row, column = (int(i) * STRIDE + PATCH // 2 for i in np.unravel_index(heat.argmax(), heat.shape))
    inside = WHERE[0].start <= row <= WHERE[0].stop and WHERE[1].start <= column <= WHERE[1].stop
    return float(heat.max() / np.median(heat)), inside


def frame():
    from matplotlib.patches import Rectangle

    rows, columns = WHERE
    size = columns.stop - columns.start, rows.stop - rows.start
    return Rectangle((columns.start - 3, rows.start - 3), size[0] + 6, size[1] + 6, fill=False, color="cyan", lw=1.5)


# %%
if __name__ == "__main__":
    main(sys.argv[1:])
