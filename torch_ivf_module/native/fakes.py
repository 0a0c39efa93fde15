"""What the functions in C++ return, for whoever traces them: shapes and dtypes without numbers."""

from __future__ import annotations

import torch


def register_fakes() -> None:
    """Tell torch, once the functions are loaded."""

    @torch.library.register_fake("torch_ivf_module::scan")
    def _scan(x, packed, bias, offsets, sizes, probed, limits, k, max_bytes):  # type: ignore[no-untyped-def]
        return x.new_empty(x.shape[0], k), probed.new_empty(x.shape[0], k)

    @torch.library.register_fake("torch_ivf_module::scan_bounds")
    def _scan_bounds(x, packed, bias, offsets, sizes, probed, limits, k, max_bytes, differences):  # type: ignore[no-untyped-def]
        return x.new_empty(x.shape[0], k), probed.new_empty(x.shape[0], k)

    @torch.library.register_fake("torch_ivf_module::exact_scores")
    def _exact_scores(x, packed, rows, differences):  # type: ignore[no-untyped-def]
        return x.new_empty(rows.shape)

    @torch.library.register_fake("torch_ivf_module::scan_above")
    def _scan_above(x, packed, bias, offsets, sizes, probed, floor):  # type: ignore[no-untyped-def]
        hits = torch.library.get_ctx().new_dynamic_size()
        return probed.new_empty(hits), probed.new_empty(hits)
