"""As in faiss, importing this makes `reconstruct` and `reconstruct_n`, which take no array, return tensors.

Methods that take vectors need no import: they return tensors for tensors.
"""

from torch_ivf_module.faiss_compat.arrays import use_tensors

use_tensors(True)
