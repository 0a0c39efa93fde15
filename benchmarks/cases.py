"""What is measured, as data: no case has code of its own.

Q queries, N base rows, L lists, P probed lists, d dim, k results.
"""

from dataclasses import dataclass, replace

_LISTS = ((128, 4), (512, 8), (2_048, 16))  # nlist and the smallest of its three values of nprobe
BATCHES = (1, 8, 32, 128, 512, 2_048, 19_600)


@dataclass(frozen=True)
class Case:
    """One data set with its settings."""

    name: str
    description: str  # one line for the report
    data: str  # the name of a maker in datasets.py
    nb: int  # base rows asked for; a data set of fixed size may hold fewer
    d: int
    nlist: int
    nprobe: int
    metric: str = "l2"
    k: int = 20
    total_queries: int = 19_600
    train_rows: int | None = None  # the first so many base rows; None is all of them
    seed: int = 1234
    nqs: tuple[int, ...] = BATCHES
    flat_nqs: tuple[int, ...] = BATCHES[:-1]
    truth_queries: int = 1_000  # brute force is run for the first so many queries
    nprobes: tuple[int, ...] = (1, 2, 4, 8, 16, 32, 64, 128)  # the recall sweep of the list-based libraries
    efs: tuple[int, ...] = (16, 24, 32, 48, 64, 128, 256, 512)  # and of the graph-based ones
    batch: int = 256  # maintenance: rows per small add
    pairs: int = 10_000  # maintenance: alternations of add(1) and search(1)
    removes: int = 1_000  # maintenance: calls that remove a few ids
    removed: int = 100  # ids per call
    auto_nqs: tuple[int, ...] = (1, 4, 16, 64, 256, 1_024)
    auto_nprobes: tuple[int, ...] = (1, 8, 32, 128)
    filter_nqs: tuple[int, ...] = (1, 256)
    profile_nqs: tuple[int, ...] = (1, 32, 2_048)
    budgets: tuple[int, ...] = (16_384, 32_768, 65_536, 131_072)  # rows per query, of sorted lists
    codes: tuple[int, ...] = (4_096, 8_192, 16_384, 32_768, 65_536)  # rows per query, in whole lists
    ivf: tuple[tuple[int, int], ...] = tuple((n, p * f) for n, p in _LISTS for f in (1, 2, 4))


_HEADLINE = Case(
    "headline", "Gaussian, 262,144 × 128, nlist 512 trained on the first 20,480 rows, nprobe 32, L2",
    "gaussian", 262_144, 128, 512, 32, train_rows=20_480, nprobes=(4, 8, 16, 32, 64, 128, 256),
)  # fmt: skip
_PATCHES = "8×8×3 patches of two photographs, 262,144 × 192, nlist 512, nprobe 8, L2"
_TOKENS = "MiniLM token embeddings, 30,522 × 384, nlist 256, nprobe 16, cosine; queries are base rows"
_EVEN = "512 clusters of 512 rows, one list each, 262,144 × 128"
_UNEVEN = "512 clusters, sizes as 1/rank (the longest 38,000), 262,144 × 128"
_ONE_LIST = "262,144 × 128 rows, all of them in one list of 512: the worst case for the workspace"
_GROWTH = [  # L is close to 4·√N and P is fixed, so the candidates grow as √N
    Case(
        f"growth-{nb // 1024}k", f"Gaussian, {nb:,} × 128, nlist {nlist:,}, nprobe 32", "gaussian", nb, 128, nlist, 32,
        total_queries=4_096, train_rows=40 * nlist, nqs=(1, 32, 2_048), truth_queries=256,
    )
    for nb, nlist in ((65_536, 1_024), (131_072, 1_448), (262_144, 2_048), (524_288, 2_896), (1_048_576, 4_096))
]  # fmt: skip
_CASES = (
    _HEADLINE,
    Case("photographs", _PATCHES, "photographs", 262_144, 192, 512, 8),
    Case("tokens", _TOKENS, "tokens", 30_522, 384, 256, 16, "cosine", total_queries=2_048, nqs=BATCHES[:-1]),
    *_GROWTH,
    Case("even-lists", _EVEN, "clusters-even", 262_144, 128, 512, 32, total_queries=8_192),
    Case("uneven-lists", _UNEVEN, "clusters-uneven", 262_144, 128, 512, 32, total_queries=8_192),
    Case("one-list", _ONE_LIST, "one-list", 262_144, 128, 512, 32, total_queries=2_048),
    Case(
        "tiny", "Gaussian, 2,000 × 16, nlist 16, nprobe 4: for trying the benchmarks themselves", "gaussian", 2_000, 16,
        16, 4, k=5, total_queries=256, nqs=(1, 32), flat_nqs=(1, 32), truth_queries=64, nprobes=(1, 4), efs=(8, 32),
        batch=64, pairs=50, removes=10, auto_nqs=(1, 16), auto_nprobes=(1, 4), filter_nqs=(1, 32), profile_nqs=(1, 32),
        budgets=(256, 512), codes=(256,), ivf=((8, 2), (16, 4)),
    ),
)  # fmt: skip
CASES: dict[str, Case] = {case.name: case for case in _CASES}
DATA = {"headline": "Gaussian", "photographs": "photographs"}  # in the READMEs, and what they are called there
# Times faiss that searches with codes are to reach over BATCHES, by what the processor multiplies with, and case.
_VNNI: dict[str, tuple[float, ...]] = {
    "headline": (3.8, 3.2, 6, 12, 15, 22, 30),
    "photographs": (3.3, 3, 3.3, 5, 7.5, 9.5, 16),
}
AIMS: dict[str, dict[str, tuple[float, ...]]] = {
    "amx_int8": {**_VNNI, "headline": (*_VNNI["headline"][:-1], 40)},
    "avx512_vnni": _VNNI,
    "avx2": {"headline": (2.5, 2, 3, 6, 9, 11, 15)},
}
FLOAT_AIMS: dict[str, tuple[float, ...]] = {  # without codes
    "headline": (1.5, 1.2, 2.5, 5, 8, 10, 14),
    "photographs": (1, 1, 1.2, 2, 4, 5, 8),
}
# The full run, in order: the tasks of each case. Any other pair can be asked for by name.
PLAN: dict[str, tuple[str, ...]] = {
    "headline": (
        *("lists", "search", "flat", "train", "add", "recall", "quantizers", "pairs", "auto", "budgets", "codes"),
        *("filters", "query_filters", "maintenance", "updates", "serving", "contention", "compiled", "memory"),
        *("formats", "profile"),
    ),
    "photographs": (
        *("lists", "search", "flat", "train", "add", "recall", "quantizers", "pairs", "auto"),
        *("serving", "contention", "compiled", "memory"),
    ),
    "tokens": ("lists", "search", "flat", "recall", "quantizers"),
    "even-lists": ("auto",),
    "uneven-lists": ("lists", "search", "auto"),
    "one-list": ("memory",),
    **{case.name: ("search",) for case in _GROWTH},
}

# --quick without a case, to compare before and after a change: the headline's search, with fewer batch sizes.
QUICK_CASE = replace(_HEADLINE, nqs=(1, 32, 2_048), truth_queries=256)
QUICK_ENGINES = ("ours", "faiss")
