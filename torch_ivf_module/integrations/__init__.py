"""Adaptors for other libraries: each is a module of its own, imported by name.

A module that subclasses something of its library imports it at once; where it is missing, the ImportError names the
extra that installs it.

>>> from torch_ivf_module.integrations.torch_geometric import L2KNNIndex
>>> L2KNNIndex().numel
0
"""
