"""A model with an index in it: saved by one process, restored, compiled and serving in another.

python examples/checkpoint_story.py [--folder FOLDER]

The model is the one of index_in_a_model.py. The first process builds it and writes model.state_dict(); the second
knows only the class and that file.
"""

import argparse
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from index_in_a_model import Retriever

ITEMS = 20_000
# Not as many as a layer is wide: of two equal sizes the compiler makes one, and so a fixed batch.
CHECKED = 50


def build(folder: Path) -> None:
    torch.manual_seed(0)
    model, items = Retriever().eval(), torch.randn(ITEMS, 64)
    with torch.no_grad():
        vectors = model.encoder(items)
        model.index.fit(vectors).add(vectors)
        torch.save(model.state_dict(), folder / "model.pt")
        torch.save({"items": items[:CHECKED], "ids": model(items[:CHECKED])[1]}, folder / "expected.pt")
    print(f"built:    {model.index.ntotal:,} items, saved {(folder / 'model.pt').stat().st_size / 2**20:.1f} MiB")


def serve(folder: Path) -> None:
    model = Retriever().eval()  # its index is empty and untrained until the next line
    model.load_state_dict(torch.load(folder / "model.pt", weights_only=True))
    print(f"restored: {model.index.ntotal:,} items")
    model.index.graph()  # what the index's forward takes when it is compiled
    compiled = torch.compile(model, fullgraph=True, dynamic=True)
    expected = torch.load(folder / "expected.pt", weights_only=True)
    with torch.no_grad():
        start = time.perf_counter()
        same = compiled(expected["items"])[1] == expected["ids"]
        print(f"compiled: in {time.perf_counter() - start:.0f} s; {same.float().mean():.0%} of the ids as before")
        for batch in (2, 8, 32):
            start = time.perf_counter()
            compiled(expected["items"][:batch].clone())
            print(f"served:   {batch} queries in {(time.perf_counter() - start) * 1e3:.1f} ms")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, help="where the checkpoint goes (default: a temporary folder)")
    parser.add_argument("--serve", action="store_true", help="be the second process")
    options = parser.parse_args()
    if options.serve:
        serve(options.folder)
        return
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.folder or Path(temporary)
        build(folder)
        sys.stdout.flush()
        subprocess.run([sys.executable, __file__, "--serve", "--folder", str(folder)], check=True)


if __name__ == "__main__":
    main()
