"""Shapes and dtypes of the operators' results, for tracing without data."""

from __future__ import annotations

import torch

from ..functional.codec import panel_bytes


def register_meta_kernels() -> None:
    """Register with torch; the library of the operators must be loaded."""

    @torch.library.register_fake("torch_ivf_module::scan")
    def _scan(x, packed, bias, offsets, sizes, probed, limits, k, max_bytes):  # type: ignore[no-untyped-def]
        return x.new_empty(x.shape[0], k), probed.new_empty(x.shape[0], k)

    @torch.library.register_fake("torch_ivf_module::probe")
    def _probe(x, coarse, nprobe, differences, max_bytes):  # type: ignore[no-untyped-def]
        shape = x.shape[0], min(nprobe, coarse[0].shape[0])
        return x.new_empty(shape), x.new_empty(shape, dtype=torch.int64)

    @torch.library.register_fake("torch_ivf_module::search_index")
    def _search_index(  # type: ignore[no-untyped-def]
        x, coarse, segments, codes, probed, limits, k, kept, nprobe, max_codes, differences, max_bytes, *filter
    ):
        rows, ids = (x.new_empty(x.shape[0], k, dtype=torch.int64) for _ in range(2))
        again, scored = (x.new_empty(x.shape[0], dtype=dtype) for dtype in (torch.bool, torch.int64))
        return x.new_empty(x.shape[0], k), rows, ids, again, scored

    @torch.library.register_fake("torch_ivf_module::encode_lists")
    def _encode_lists(packed, offsets, sizes, d):  # type: ignore[no-untyped-def]
        lists, panels = offsets.shape[0] - 1, torch.library.get_ctx().new_dynamic_size()
        floats = (packed.new_empty(shape, dtype=torch.float32) for shape in ((lists, d), (panels, 2), (lists, 3)))
        centres, norms, limits = floats
        codes = packed.new_empty(panels * panel_bytes(d), dtype=torch.uint8)
        return centres, codes, torch.empty_like(offsets), norms, limits

    @torch.library.register_fake("torch_ivf_module::group_cells")
    def _group_cells(probed, groups, cells):  # type: ignore[no-untyped-def]
        lists = torch.library.get_ctx().new_dynamic_size()
        return probed.new_empty(lists), probed.new_empty(lists), torch.empty_like(probed)

    @torch.library.register_fake("torch_ivf_module::scan_above")
    def _scan_above(x, packed, bias, offsets, sizes, probed, threshold):  # type: ignore[no-untyped-def]
        hits = torch.library.get_ctx().new_dynamic_size()
        return probed.new_empty(x.shape[0] + 1), probed.new_empty(hits)
