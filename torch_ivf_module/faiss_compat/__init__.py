"""faiss's Python interface over the indexes of this library: ``import torch_ivf_module.faiss_compat as faiss``.

Functions take and return arrays, or tensors. The page "In place of faiss" of the documentation lists the differences
from faiss. Names that are not supported raise `Unsupported`, an AttributeError that lists the supported ones.

>>> import numpy
>>> index = IndexFlatL2(2)
>>> index.add(numpy.eye(2))
>>> index.search(numpy.array([[0.0, 0.9]]), 1)[1]
array([[1]])
"""

from typing import Any

from . import contrib  # noqa: F401  `install` looks it up
from .arrays import Float16, Float32, Int8, UInt8, Unsupported
from .base import Index
from .clustering import Clustering, ClusteringParameters, Kmeans
from .constants import (
    METRIC_GOWER,
    METRIC_INNER_PRODUCT,
    METRIC_L1,
    METRIC_L2,
    DirectMap,
    METRIC_BrayCurtis,
    METRIC_Canberra,
    METRIC_Jaccard,
    METRIC_JensenShannon,
    METRIC_Linf,
    METRIC_Lp,
    METRIC_NaNEuclidean,
    ScalarQuantizer,
    is_similarity_metric,
)
from .devices import (
    GpuClonerOptions,
    GpuMultipleClonerOptions,
    StandardGpuResources,
    get_num_gpus,
    index_cpu_to_all_gpus,
    index_cpu_to_gpu,
    index_cpu_to_gpu_multiple_py,
    index_cpu_to_gpus_list,
    index_gpu_to_cpu,
)
from .extract import (
    ParameterSpace,
    downcast_index,
    downcast_VectorTransform,
    extract_index_ivf,
    try_extract_index_ivf,
)
from .factory import index_factory
from .files import (
    IO_FLAG_MMAP,
    IO_FLAG_MMAP_IFC,
    IO_FLAG_ONDISK_SAME_DIR,
    IO_FLAG_READ_ONLY,
    IO_FLAG_SKIP_PRECOMPUTE_TABLE,
    BufferedIOReader,
    BufferedIOWriter,
    PyCallbackIOReader,
    PyCallbackIOWriter,
    VectorIOReader,
    VectorIOWriter,
    clone_index,
    deserialize_index,
    read_index,
    serialize_index,
    write_index,
)
from .flat import IndexFlat, IndexFlatIP, IndexFlatL2
from .functions import (
    get_compile_options,
    knn,
    knn_gpu,
    normalize_L2,
    omp_get_max_threads,
    omp_set_num_threads,
    pairwise_distances,
)
from .id_map import IndexIDMap, IndexIDMap2
from .in_place import install, installed, uninstall
from .invlists import InvertedLists
from .ivf import IndexIVF, IndexIVFFlat
from .parameters import SearchParameters, SearchParametersIVF, SearchParametersPreTransform
from .pre_transform import IndexPreTransform
from .scalar_quantizer import IndexIVFScalarQuantizer, IndexScalarQuantizer
from .selectors import (
    IDSelector,
    IDSelectorAll,
    IDSelectorAnd,
    IDSelectorArray,
    IDSelectorBatch,
    IDSelectorBitmap,
    IDSelectorNot,
    IDSelectorOr,
    IDSelectorRange,
    IDSelectorXOr,
)
from .transforms import (
    CenteringTransform,
    LinearTransform,
    NormalizationTransform,
    OPQMatrix,
    PCAMatrix,
    RandomRotationMatrix,
    VectorTransform,
)
from .vectors import Vector, copy_array_to_vector, rev_swig_ptr, swig_ptr, vector_float_to_array, vector_to_array
from .wrapping import wrap

IVFSearchParameters = SearchParametersIVF
__version__ = "1.15.1"  # the release of faiss whose interface this is

__all__ = [
    "IO_FLAG_MMAP",
    "IO_FLAG_MMAP_IFC",
    "IO_FLAG_ONDISK_SAME_DIR",
    "IO_FLAG_READ_ONLY",
    "IO_FLAG_SKIP_PRECOMPUTE_TABLE",
    "METRIC_GOWER",
    "METRIC_INNER_PRODUCT",
    "METRIC_L1",
    "METRIC_L2",
    "BufferedIOReader",
    "BufferedIOWriter",
    "CenteringTransform",
    "Clustering",
    "ClusteringParameters",
    "DirectMap",
    "Float16",
    "Float32",
    "GpuClonerOptions",
    "GpuMultipleClonerOptions",
    "IDSelector",
    "IDSelectorAll",
    "IDSelectorAnd",
    "IDSelectorArray",
    "IDSelectorBatch",
    "IDSelectorBitmap",
    "IDSelectorNot",
    "IDSelectorOr",
    "IDSelectorRange",
    "IDSelectorXOr",
    "IVFSearchParameters",
    "Index",
    "IndexFlat",
    "IndexFlatIP",
    "IndexFlatL2",
    "IndexIDMap",
    "IndexIDMap2",
    "IndexIVF",
    "IndexIVFFlat",
    "IndexIVFScalarQuantizer",
    "IndexPreTransform",
    "IndexScalarQuantizer",
    "Int8",
    "InvertedLists",
    "Kmeans",
    "LinearTransform",
    "METRIC_BrayCurtis",
    "METRIC_Canberra",
    "METRIC_Jaccard",
    "METRIC_JensenShannon",
    "METRIC_Linf",
    "METRIC_Lp",
    "METRIC_NaNEuclidean",
    "NormalizationTransform",
    "OPQMatrix",
    "PCAMatrix",
    "ParameterSpace",
    "PyCallbackIOReader",
    "PyCallbackIOWriter",
    "RandomRotationMatrix",
    "ScalarQuantizer",
    "SearchParameters",
    "SearchParametersIVF",
    "SearchParametersPreTransform",
    "StandardGpuResources",
    "UInt8",
    "Unsupported",
    "Vector",
    "VectorIOReader",
    "VectorIOWriter",
    "VectorTransform",
    "clone_index",
    "copy_array_to_vector",
    "deserialize_index",
    "downcast_VectorTransform",
    "downcast_index",
    "extract_index_ivf",
    "get_compile_options",
    "get_num_gpus",
    "index_cpu_to_all_gpus",
    "index_cpu_to_gpu",
    "index_cpu_to_gpu_multiple_py",
    "index_cpu_to_gpus_list",
    "index_factory",
    "index_gpu_to_cpu",
    "install",
    "installed",
    "is_similarity_metric",
    "knn",
    "knn_gpu",
    "normalize_L2",
    "omp_get_max_threads",
    "omp_set_num_threads",
    "pairwise_distances",
    "read_index",
    "rev_swig_ptr",
    "serialize_index",
    "swig_ptr",
    "try_extract_index_ivf",
    "uninstall",
    "vector_float_to_array",
    "vector_to_array",
    "wrap",
    "write_index",
]


def __getattr__(name: str) -> Any:
    if name.startswith("__"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    indexes = [known for known in __all__ if known.startswith("Index")]
    raise Unsupported(
        f"faiss_compat has no {name!r}. Indexes that it has: {', '.join(indexes)}; the page 'In place of faiss' of "
        "the documentation lists everything else"
    )
