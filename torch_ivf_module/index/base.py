"""The base class of flat and inverted-file indexes: an nn.Module that owns a `ListStore`.

Its methods are functions in other files of this folder, by topic; the class body is the table of contents.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from .. import gpu, native  # noqa: F401  register the kernels
from ..functional import metric as metrics
from ..functional.options import SearchOptions
from ..functional.strategies import MODES
from ..params import DEFAULTS, SearchParams, positive
from . import building, extensions, module, operator, reading, schema, searching, torch_ivf_compat, training, validation
from .coding import Setting, codes_property
from .eager import eager, refuse_scripting
from .integrity import CHECKSUMS
from .row_format import FloatRows, RowFormat
from .store import ListStore

Self = TypeVar("Self", bound="IndexBase")


class IndexBase(nn.Module):
    """A vector index whose state is buffers of a torch.nn.Module. Use one of its subclasses.

    `store` has the packed lists, the pending rows and the lookup by id, for code that extends this library.
    """

    centroids: Tensor
    packed_embeddings: Tensor  # or packed_codes, as `store.format` says
    packed_codes: Tensor
    list_offsets: Tensor
    list_ids: Tensor
    next_id: Tensor
    store: ListStore
    _handle: int  # by which compiled models find this index

    _flat = False
    _version = 1  # of the state_dict
    _codes: Setting = "auto"  # also of an index that was pickled before it had the setting
    __prepare_scriptable__ = refuse_scripting

    def __init__(
        self,
        format: RowFormat,
        *,
        metric: str,
        k: int = 10,
        search_mode: str = "auto",
        max_bytes: int = 256 << 20,
        codes: Setting = "auto",
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        self._format = format
        self.d = format.d
        self.metric = metrics.check_metric(metric)
        for name, tensor in (empty := schema.empty(format, flat=self._flat, device=device)).items():
            self.register_buffer(name, tensor)
        self.register_buffer(CHECKSUMS, torch.zeros(3, dtype=torch.int64, device=device), persistent=False)
        self._make_store()
        self.store.put(**empty)
        self.k = k
        self.search_mode = search_mode
        self.max_bytes = max_bytes
        self.codes = codes
        self.last_search_stats: dict[str, Any] | None = None  # of the last search with debug_stats

    # -- settings ------------------------------------------------------------------------------------------

    @property
    def search_mode(self) -> str:
        """ "auto", "csr" (list-major) or "matrix" (query-major). It changes the time, not the results.

        "auto" uses the kernel of the device, or the mode with the lower predicted time if there is none.
        """
        return self._search_mode

    @search_mode.setter
    def search_mode(self, value: str) -> None:
        value = "csr" if value == "chunked" else value  # the name in flat indexes of torch-ivf
        if value not in MODES:
            raise ValueError(f"search_mode must be one of {', '.join(map(repr, MODES))}, got {value!r}")
        self._search_mode = value

    @property
    def k(self) -> int:
        """Results that `forward` returns."""
        return self._k

    @k.setter
    def k(self, value: int) -> None:
        self._k = positive(value, "k")
        self.store.graph = None

    codes = codes_property

    @property
    def max_bytes(self) -> int:
        """Workspace memory that a search may use, in bytes."""
        return self._max_bytes

    @max_bytes.setter
    def max_bytes(self, value: int) -> None:
        self._max_bytes = positive(value, "max_bytes")

    def search_options(self, k: int, params: SearchParams | None = None) -> SearchOptions:
        """The options of a search of k results by `params`, whose None values are the settings of the index."""
        exact = params is not None and params.profile == "exact"
        return SearchOptions(k, 1, self.metric, self._search_mode, max_bytes=self._max_bytes, exact=exact)

    def checked_params(self, params: SearchParams | None) -> SearchParams:
        """`params`, or the defaults for None. TypeError for anything else."""
        if params is not None and not isinstance(params, SearchParams):
            raise TypeError(f"params must be SearchParams or None, got {type(params).__name__}")
        return params or DEFAULTS

    def config(self) -> dict[str, Any]:
        """The constructor arguments of this index; the buffers are not included."""
        return {
            "d": self.d,
            "metric": self.metric,
            "k": self.k,
            "search_mode": self.search_mode,
            "max_bytes": self.max_bytes,
            "codes": self.codes,
            **self.store.format.config(self.store.packed),
        }

    def extra_repr(self) -> str:
        """The settings, for repr."""
        hidden = [("codes", "auto"), ("auto_rebalance", None), ("max_bytes", self.max_bytes)]
        shown = {key: value for key, value in self.config().items() if key != "dtype" and (key, value) not in hidden}
        words = [f"{key}={value!r}" if key != "d" else str(value) for key, value in shown.items()]
        return ", ".join([*words, f"ntotal={self.ntotal}", f"dtype={self.dtype}", f"device={self.device}"])

    # -- size and place ------------------------------------------------------------------------------------

    @property
    def ntotal(self) -> int:
        """Vectors in the index."""
        return self.store.ntotal

    @property
    def is_trained(self) -> bool:
        """Whether vectors can be added."""
        return self.store.is_trained

    @property
    def device(self) -> torch.device:
        """The device of the vectors."""
        return self.store.device

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the vectors: as they are stored, or float32 if codes are."""
        return self.store.dtype

    rocm = torch_ivf_compat.rocm
    dml = torch_ivf_compat.dml

    # -- building ------------------------------------------------------------------------------------------

    train = training.train

    @eager
    def fit(
        self: Self,
        x: Tensor,
        *,
        niter: int = 10,
        max_points_per_centroid: int = 256,
        seed: int = 1234,
        generator: torch.Generator | None = None,
        verbose: bool = False,
    ) -> Self:
        """Only check x (n, d): a flat index needs no training. Settings as in `IndexIVF.fit`. Returns self."""
        validation.vectors(x, "x", self.d, self.device)
        return self

    add = building.add
    add_with_ids = building.add_with_ids
    remove_ids = building.remove_ids
    update = building.update
    merge_from = building.merge_from
    copy_subset = building.copy_subset
    reset = building.reset
    reset_parameters = building.reset_parameters

    # -- searching -----------------------------------------------------------------------------------------

    search = searching.search
    search_and_reconstruct = searching.search_and_reconstruct
    range_search = searching.range_search
    forward = searching.forward
    graph = extensions.graph

    # -- reading -------------------------------------------------------------------------------------------

    reconstruct = reading.reconstruct
    reconstruct_n = reading.reconstruct_n
    reconstruct_batch = reading.reconstruct_batch
    list_sizes = reading.list_sizes
    list_stats = reading.list_stats
    imbalance_factor = reading.imbalance_factor
    memory_bytes = reading.memory_bytes
    groups_of = reading.groups_of
    group_sizes = reading.group_sizes
    check_buffers = reading.check_buffers

    # -- files ---------------------------------------------------------------------------------------------

    save = extensions.save
    load = extensions.load
    save_pretrained = extensions.save_pretrained
    push_to_hub = extensions.push_to_hub
    from_pretrained = extensions.from_pretrained

    # -- torch.nn.Module -----------------------------------------------------------------------------------

    def _make_store(self) -> None:
        self.__dict__["store"] = ListStore(self.__dict__["_buffers"], self._format, self.metric, flat=self._flat)
        self._handle = operator.new_handle(self)

    # Code that reads the buffers, as state_dict(), calls `_buffers` or `__getattr__`, which pack pending rows first.

    @property
    def _buffers(self) -> dict[str, Tensor | None]:
        store: ListStore | None = self.__dict__.get("store")
        if store is not None:
            store.hand_out()
        buffers: dict[str, Tensor | None] = self.__dict__["_buffers"]
        return buffers

    @_buffers.setter
    def _buffers(self, buffers: dict[str, Tensor | None]) -> None:
        self.__dict__["_buffers"] = buffers
        if "store" in self.__dict__:  # torch.nn.DataParallel makes a replica with the other attributes of the original
            self._make_store()

    def __getattr__(self, name: str) -> Any:
        store: ListStore | None = self.__dict__.get("store")
        if store is not None and name in store.own:
            store.hand_out()
        return super().__getattr__(name)

    def __setattr__(self, name: str, value: Any) -> None:
        validation.unchanged(name, value, self.__dict__)
        super().__setattr__(name, value)
        store: ListStore | None = self.__dict__.get("store")
        if store is not None and name in store.names:
            store.new_version()

    def _apply(self: Self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        before = self.store.about_to_move()
        super()._apply(fn, recurse)
        module.restore_dtypes(self.store, before)
        return self

    def without_own_buffers(self) -> AbstractContextManager[None]:
        """A context in which the module has only buffers that are not the index's; the index must not be used in it."""
        return module.without_own_buffers(self.store)

    def __getstate__(self) -> dict[str, Any]:
        with self.store.lock:
            self.store.hand_out()
            settings = {name: value for name, value in self.__dict__.items() if name not in ("store", "_handle")}
            buffers = dict(self.__dict__["_buffers"])  # so that copy.copy shares tensors, but nothing that changes
            return {**settings, "_buffers": buffers, **module.store_state(self.store)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        state = {"_format": FloatRows(state["d"]), **state}  # which older pickles lack
        super().__setstate__({name: value for name, value in state.items() if name not in module.STORE_STATE})
        self._make_store()
        module.set_store_state(self.store, state)

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        with self.store.lock:  # of one version, whatever other threads add
            super()._save_to_state_dict(destination, prefix, keep_vars)

    def _load_from_state_dict(
        self, state_dict: Mapping[str, Any], prefix: str, local_metadata: dict[str, Any], strict: bool, *lists: Any
    ) -> None:
        """Load all buffers of the index, of any size, or none of them; other entries load as in any module.

        load_state_dict of any parent calls this.
        """
        missing_keys, _, error_msgs = lists
        names = module.loaded_names(self.store.saved, self._non_persistent_buffers_set)
        with module.own_loading(self, state_dict, prefix, local_metadata, strict, *lists, names=names) as others:
            if names:
                module.load_buffers(self, state_dict, prefix, local_metadata, strict, missing_keys, error_msgs)
            super()._load_from_state_dict(others, prefix, local_metadata, strict, *lists)
