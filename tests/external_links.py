"""The links to other sites in the pages of this repository: `python -m tests.external_links [--check]`.

Prints each address and the pages that have it. With `--check` it asks for every one of them, which needs the internet,
and exits with code 1 if one cannot be had.
"""

from __future__ import annotations

import argparse
import re
import sys
import urllib.request
from collections import defaultdict
from pathlib import Path

from tests.test_docs import PROSE, ROOT

ADDRESS = re.compile(r"""https?://[^\s<>"'`)\]};,]+""")
ELSEWHERE = ("pyproject.toml", "CITATION.cff", "torch_ivf_module/_pytorch.py")


def addresses() -> dict[str, list[str]]:
    """The pages that have each address."""
    found = defaultdict(list)
    for page in [*PROSE, *(Path(ROOT, name) for name in ELSEWHERE)]:
        for address in sorted(set(ADDRESS.findall(page.read_text(encoding="utf-8")))):
            found[address].append(page.relative_to(ROOT).as_posix())
    return dict(sorted(found.items()))


def answer(address: str) -> str | None:
    """What is wrong with an address, None if it can be had."""
    request = urllib.request.Request(address, headers={"User-Agent": "links of torch_ivf_module"})
    try:
        with urllib.request.urlopen(request, timeout=20):
            return None
    except OSError as error:  # HTTPError and URLError are of this kind
        return str(error)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="ask for every address")
    check = parser.parse_args().check
    wrong = 0
    for address, pages in addresses().items():
        said = answer(address) if check else None
        wrong += said is not None
        print(f"{address}: {', '.join(pages)}" + (f": {said}" if said else ""))
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main())
