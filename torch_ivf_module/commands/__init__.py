"""The commands of ``python -m torch_ivf_module``, a module each."""
