"""Files of vectors in every format, for the tests of the commands that read them."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from torch_ivf_module import IndexFlatL2

ROWS, D = 900, 12


def records(path, x, item):
    with path.open("wb") as file:
        for row in x.numpy().astype(item):
            file.write(np.int32(len(row)).tobytes() + row.tobytes())


def hdf5(path, x, distance="euclidean"):
    with pytest.importorskip("h5py").File(path, "w") as file:
        file["train"], file["test"] = x.numpy(), x[:20].numpy()
        index = IndexFlatL2(D)
        index.add(x)
        file["neighbors"] = index.search(x[:20], 10)[1].numpy().astype(np.int32)
        file.attrs["distance"] = distance
        file["distances"] = np.zeros((20, 10), dtype=np.float32)


def safetensors(path, x):
    pytest.importorskip("safetensors.torch").save_file({"vectors": x}, path)


def matrix(path, x, item):
    """A file in the format of big-ann-benchmarks."""
    path.write_bytes(np.array(x.shape, "<u4").tobytes() + x.numpy().astype(item).tobytes())


def nested(path, x):
    """An HDF5 file with nested groups, a link to a parent group, and a broken link."""
    h5py = pytest.importorskip("h5py")
    with h5py.File(path, "w") as file:
        file["images/vectors/x"], file["images/ids"] = x.numpy(), np.arange(len(x)) * 3
        file["images/back"], file["nothing"] = h5py.SoftLink("/images"), h5py.SoftLink("/nowhere")


def parquet(path, x, fixed=True, **columns):
    """A Parquet file with row groups of 250 rows; the type of the vectors is a list of fixed or of variable length."""
    arrow = pytest.importorskip("pyarrow")
    if fixed:
        vectors = arrow.FixedSizeListArray.from_arrays(arrow.array(x.numpy().ravel()), x.shape[1])
    else:
        vectors = arrow.array(x.tolist(), arrow.list_(arrow.float32()))
    table = arrow.table({"name": ["a"] * len(x), "vectors": vectors, **columns})
    pytest.importorskip("pyarrow.parquet").write_table(table, path, row_group_size=250, write_page_checksum=True)


WRITERS = {
    "x.npy": lambda path, x: np.save(path, x.numpy()),
    "columns.npy": lambda path, x: np.save(path, np.asfortranarray(x.numpy())),
    "big-endian.npy": lambda path, x: np.save(path, x.numpy().astype(">f4")),
    "x.npz": lambda path, x: np.savez(path, other=np.arange(3), x=x.numpy()),
    "packed.npz": lambda path, x: np.savez_compressed(path, x=x.numpy()),
    "x.pt": lambda path, x: torch.save(x, path),
    "dict.pt": lambda path, x: torch.save({"x": x, "label": "words", "count": torch.arange(3)}, path),
    "x.safetensors": safetensors,
    "x.fvecs": lambda path, x: records(path, x, "<f4"),
    "x.fbin": lambda path, x: matrix(path, x, "<f4"),
    "x.hdf5": hdf5,
    "nested.h5": nested,
    "fixed.parquet": parquet,
    "lists.parquet": lambda path, x: parquet(path, x, fixed=False),
}
