"""Per-call search settings."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from ._arrays import as_tensor

# What a profile says of the fields that a caller leaves None.
PROFILES: dict[str, dict[str, Any]] = {
    "exact": {},
    "speed": {},
    "approx": {},
    "approx_fast": {"candidate_budget": 32_768, "use_per_list_sizes": True},
    "approx_balanced": {"candidate_budget": 65_536, "use_per_list_sizes": True},
    "approx_quality": {"candidate_budget": 131_072, "use_per_list_sizes": True},
}
STRATEGIES = ("uniform", "distance_weighted")
ORDERINGS = ("none", "residual_norm_asc", "proj_desc")
POLICIES = ("manual", "auto_threshold")
_CHOICES = {
    "profile": tuple(PROFILES),
    "budget_strategy": STRATEGIES,
    "list_ordering": (*ORDERINGS, None),
    "rebuild_policy": POLICIES,
}
_FLAGS = ("use_per_list_sizes", "safe_pruning", "dynamic_nprobe", "strict_budget", "debug_stats", "approximate")
_COUNTS = ("max_codes", "candidate_budget", "rebuild_threshold_adds", "min_codes_per_list", "max_codes_cap_per_list")
_TENSORS = ("selector", "exclude", "groups")
_SHARE = ("use_per_list_sizes", "dynamic_nprobe", "min_codes_per_list", "strict_budget")  # a budget, so need one


@dataclass(frozen=True, repr=False)
class SearchParams:
    """Settings of one search. A field of None has the value of the profile, or else of the index.

    Parameters
    ----------
    profile : "speed" (default) ranks rows by a rounded score with an error bound, and scores the best exactly. "exact"
        scores every row of the probed lists exactly, which takes several times as long. "approx" is "speed" with your
        own budget. "approx_fast", "approx_balanced" and "approx_quality" have a budget of 32,768, 65,536 or 131,072
        rows, and `use_per_list_sizes`.
    nprobe : number of lists to probe, >= 1.
    max_codes : maximum of rows to read. Complete lists are read, nearest first, while their total is within it; the
        nearest list is always read. 0 means no limit.
    candidate_budget : number of rows that a query reads in all its lists together; it reads the first rows of each
        list. 0 means no limit.
    budget_strategy : "distance_weighted" reads more rows of near lists, "uniform" the same number of each.
    use_per_list_sizes : whether at most ceil(candidate_budget / nprobe) rows of a list are read.
    min_codes_per_list : minimum of rows to read of each list.
    max_codes_cap_per_list : maximum of rows to read of each list, also without a budget. 0 means no limit.
    dynamic_nprobe : whether the farthest lists are not read if `min_codes_per_list` of all lists exceeds the budget.
    strict_budget : whether a query never exceeds the budget; otherwise rounding and minima may.
    list_ordering, rebuild_policy, rebuild_threshold_adds : with the policy "auto_threshold" the search first calls
        ``index.rebuild_lists(ordering=list_ordering)`` if the lists have another order, or if the threshold is not 0
        and this many rows were added since. With "manual" (default) it does not.
    safe_pruning : has no effect, as in torch-ivf.
    selector : the ids that may be found: int64 (n,) in any order, or a bool mask (n,) whose entry i is for id i; a
        tensor, array or list. For each query: a bool mask (nq, n), or a list of nq lists of ids. See docs/filters.md.
    exclude : int64 (nq, m), ids that each query must not find; -1 excludes nothing.
    groups : int64 (nq,), the group of each query. A query finds only rows that were added with this group, and reads no
        others. -1 means the rows that were added without a group.
    group_by : maximum of results with the same group, >= 1: the best k rows under this limit. Rows without a group are
        not limited.
    debug_stats : whether to write a dict about the search to ``index.last_search_stats``.
    approximate : True means profile="approx".

    Raises ValueError or TypeError for a wrong value, naming the field.

    >>> SearchParams(nprobe=4)
    SearchParams(nprobe=4)
    >>> SearchParams(profile="approx_fast", candidate_budget=20_000).of("candidate_budget")
    20000
    """

    profile: str = "speed"
    nprobe: int | None = None
    max_codes: int | None = None
    candidate_budget: int | None = None
    budget_strategy: str = "distance_weighted"
    list_ordering: str | None = None
    rebuild_policy: str = "manual"
    rebuild_threshold_adds: int = 0
    use_per_list_sizes: bool | None = None
    safe_pruning: bool | None = None
    dynamic_nprobe: bool = False
    min_codes_per_list: int = 0
    max_codes_cap_per_list: int = 0
    strict_budget: bool = False
    debug_stats: bool = False
    selector: Tensor | tuple[Tensor, ...] | None = None
    exclude: Tensor | None = None
    approximate: bool = False
    groups: Tensor | None = None
    group_by: int | None = None

    def __post_init__(self) -> None:
        for name, choices in _CHOICES.items():
            if getattr(self, name) not in choices:
                known = ", ".join(map(repr, choices))
                raise ValueError(f"{name} must be one of {known}, got {getattr(self, name)!r}")
        for name in _FLAGS:
            if not isinstance(getattr(self, name), (bool, type(None))):
                raise TypeError(f"{name} must be a bool, got {type(getattr(self, name)).__name__}")
        for name in _COUNTS:
            whole(getattr(self, name) or 0, name, 0)
        if self.nprobe is not None:
            positive(self.nprobe, "nprobe")
        if self.group_by is not None:
            positive(self.group_by, "group_by")
        if self.selector is not None:
            object.__setattr__(self, "selector", _selector(self.selector))
        for name in ("exclude", "groups"):
            if getattr(self, name) is not None:
                object.__setattr__(self, name, as_tensor(getattr(self, name), name))
        lost = [name for name in _SHARE if getattr(self, name)]
        if lost and not self.of("candidate_budget"):
            raise ValueError(f"{lost[0]} needs a candidate_budget: pass one, or a profile that has one")

    def of(self, name: str) -> Any:
        """The value of a field, or the profile's where it is None."""
        own = getattr(self, name)
        return PROFILES[self.profile].get(name) if own is None else own

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, SearchParams):
            return NotImplemented
        # Comparing tensors gives tensors: the same selector is the same object.
        same = all(getattr(self, name) is getattr(other, name) for name in _TENSORS)
        return same and self._values() == other._values()

    def __hash__(self) -> int:
        return hash((*(id(getattr(self, name)) for name in _TENSORS), self._values()))

    def _values(self) -> tuple[Any, ...]:
        return tuple(getattr(self, field.name) for field in fields(self) if field.name not in _TENSORS)

    @property
    def per_query(self) -> bool:
        """Whether each query has a filter of its own."""
        return self.exclude is not None or (self.selector is not None and not shared(self.selector))

    def __repr__(self) -> str:
        given = [f for f in fields(self) if getattr(self, f.name) is not f.default]
        return f"SearchParams({', '.join(f'{f.name}={getattr(self, f.name)!r}' for f in given)})"


def repeated(params: SearchParams, times: int) -> SearchParams:
    """`params` for all queries again and again, so many times."""
    if not params.per_query and params.groups is None:
        return params
    selector, exclude, groups = params.selector, params.exclude, params.groups
    if isinstance(selector, tuple):
        selector = selector * times
    elif selector is not None and not shared(selector):
        selector = selector.repeat(times, 1)
    return replace(
        params,
        selector=selector,
        exclude=None if exclude is None else exclude.repeat(times, 1),
        groups=None if groups is None else groups.repeat(times),
    )


def shared(selector: Tensor | tuple[Tensor, ...]) -> bool:
    """Whether a selector is the same for all queries."""
    return isinstance(selector, Tensor) and selector.dim() == 1


def _selector(value: Any) -> Tensor | tuple[Tensor, ...]:
    """A tensor, or a list of ids for each query."""
    if isinstance(value, (list, tuple)) and any(map(_is_list, value)):
        lists = tuple(as_tensor(item, f"selector[{i}]") for i, item in enumerate(value))
        if not all(item.dtype == torch.bool for item in lists):  # else rows of one mask
            return value if isinstance(value, tuple) and all(isinstance(item, Tensor) for item in value) else lists
    return as_tensor(value, "selector")


def _is_list(value: Any) -> bool:
    return value.dim() > 0 if isinstance(value, Tensor) else hasattr(value, "__len__")


def positive(value: int, name: str) -> int:
    """`value` as an int of at least 1, or TypeError / ValueError naming the argument."""
    return whole(value, name, 1)


def whole(value: int, name: str, least: int) -> int:
    """`value` as an int of at least `least`, or TypeError / ValueError naming the argument."""
    if isinstance(value, bool) or not hasattr(value, "__index__"):
        raise TypeError(f"{name} must be an int, got {type(value).__name__}")
    if value < least:
        raise ValueError(f"{name} must be >= {least}, got {value}")
    return int(value)


DEFAULTS = SearchParams()  # what a search without `params` has
