"""One index over the processes of a torch.distributed group."""

from .checkpoint_files import newest
from .index import ShardedIndex

__all__ = ["ShardedIndex", "newest"]
