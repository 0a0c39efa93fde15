"""Which indexes can be divided over processes."""

from __future__ import annotations

from ..index import IndexIVF
from ..index.base import IndexBase

SHARDS = ("rows", "lists")


def check_shardable(index: object, shard: str) -> None:
    """TypeError or ValueError that says what is wrong with the arguments of `ShardedIndex`."""
    if not isinstance(index, IndexBase):
        raise TypeError(f"index must be a flat or inverted-file index, got {type(index).__name__}")
    if shard not in SHARDS:
        raise ValueError(f"shard must be one of {', '.join(map(repr, SHARDS))}, got {shard!r}")
    if index.store.grouped:
        raise ValueError("index has rows with groups, which a ShardedIndex does not support: use a plain index")
    if shard == "lists" and not isinstance(index, IndexIVF):
        raise ValueError(f"shard='lists' needs an inverted file, got {type(index).__name__}; use shard='rows'")
    if isinstance(index, IndexIVF) and index.auto_rebalance is not None:
        raise ValueError("index must have auto_rebalance = None to be sharded: processes must keep the same centroids")
