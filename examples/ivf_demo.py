"""The demo as a script; the same as ``python -m torch_ivf_module demo``, with the same flags.

python examples/ivf_demo.py --dim 128 --nb 100000 --nlist 256 --nprobe 8 --verify
"""

import sys

from torch_ivf_module.cli import main

if __name__ == "__main__":
    sys.exit(main(["demo", *sys.argv[1:]]))
