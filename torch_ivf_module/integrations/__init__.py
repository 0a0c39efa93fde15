"""Adaptors for other libraries. Import the module of a library by its name.

If the library is not installed, the import or the first call raises an ImportError that names the extra.

>>> from torch_ivf_module.integrations.torch_geometric import L2KNNIndex
>>> L2KNNIndex().numel
0
"""
