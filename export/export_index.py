"""Export a saved index as a model file that searches without this package.

python export/export_index.py INDEX --format onnx --k 10 --nprobe 16 --check

The same as ``python -m torch_ivf_module export``: INDEX is what `index.save(path)` wrote, the file goes beside it
unless --out says where, and --check runs it on random queries and compares its answers with the index's own.
"""

import sys

from torch_ivf_module.cli import main

if __name__ == "__main__":
    sys.exit(main(["export", *sys.argv[1:]]))
