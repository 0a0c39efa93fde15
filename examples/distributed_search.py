"""One index over several processes: built together, searched together, checked against a single index, saved.

torchrun --nproc-per-node 4 examples/distributed_search.py
torchrun --nproc-per-node 2 examples/distributed_search.py --shard lists --folder checkpoints

Each process has its own share of patches of two photographs, and queries of its own (extra `demo`). Run again with the
same folder and any number of processes, it starts from the checkpoint.
"""

import argparse
import time
from pathlib import Path

import torch
import torch.distributed as dist
from tqdm import tqdm

from torch_ivf_module import IndexIVFFlat, ShardedIndex
from torch_ivf_module.photographs import photograph_patches

K = 10


def build(options: argparse.Namespace, base: torch.Tensor, lead: bool) -> ShardedIndex:
    nlist = max(1, options.nb // 500)
    index = ShardedIndex(IndexIVFFlat(base.shape[1], nlist=nlist, nprobe=8), shard=options.shard)
    if options.folder and (options.folder / "newest").exists():
        return index.restore(options.folder)
    index.train(base, verbose=True)
    # Every process adds as often as the others; one that has run out of rows adds none.
    batches = [
        base[start : start + options.batch]
        for start in range(0, options.nb // dist.get_world_size() + 1, options.batch)
    ]
    for batch in tqdm(batches, desc="add", disable=not lead):
        index.add(batch)
    if options.folder:
        index.save(options.folder)
    return index


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nb", type=int, default=131_072, help="vectors in all")
    parser.add_argument("--nq", type=int, default=2_000, help="queries in all")
    parser.add_argument("--batch", type=int, default=16_384, help="vectors that a process adds at a time")
    parser.add_argument("--shard", choices=["rows", "lists"], default="rows")
    parser.add_argument("--folder", type=Path, help="where checkpoints go (default: none)")
    options = parser.parse_args()
    dist.init_process_group("gloo")
    rank, size = dist.get_rank(), dist.get_world_size()
    lead = rank == 0
    # In earnest each process would read its own files; here all draw the same patches and keep every size-th.
    base, queries = map(torch.from_numpy, photograph_patches(options.nb, options.nq))
    index = build(options, base[rank::size], lead)
    about = index.info()

    own = queries[rank::size]
    index.search(own, K)
    start = time.perf_counter()
    found, _ = index.search(own, K)
    seconds = time.perf_counter() - start

    # The same centroids and all the vectors in one index: distances have to be the same.
    state = {
        name: part.full_tensor() if hasattr(part, "full_tensor") else part for name, part in index.state_dict().items()
    }
    single = IndexIVFFlat(index.d, nprobe=index.nprobe)
    single.load_state_dict(state)
    same = torch.isclose(found, single.search(own, K)[0], rtol=1e-4, atol=1e-5).float().mean()
    dist.all_reduce(same)
    if lead:
        print(f"{size} processes: {index.ntotal:,} vectors, of which they hold {about['rows']}")
        print(
            f"{len(queries) / seconds:,.0f} queries/s; {same / size:.2%} of the distances are those of a single index"
        )
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
