"""faiss_compat in place of faiss, which must not be installed here."""

from __future__ import annotations

import importlib.metadata

from torch_ivf_module import faiss_compat

names = {(part.name or "").lower() for part in importlib.metadata.distributions()}
if found := [name for name in sorted(names) if name.startswith("faiss")]:
    raise RuntimeError(f"these tests are for an environment without faiss, but {', '.join(found)} is installed")
faiss_compat.install()
