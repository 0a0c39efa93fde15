"""The texts of the generated parts of Japanese pages."""

JAPANESE = {
    "Gaussian": "ガウス乱数",
    "photographs": "写真",
    "Gaussian, 262,144 × 128, nlist 512 trained on the first 20,480 rows, nprobe 32, L2": (
        "ガウス乱数 262,144 × 128、nlist 512(先頭 20,480 行で学習)、nprobe 32、L2"
    ),
    "8×8×3 patches of two photographs, 262,144 × 192, nlist 512, nprobe 8, L2": (
        "写真 2 枚の 8×8×3 パッチ 262,144 × 192、nlist 512、nprobe 8、L2"
    ),
    "with 8-bit copy": "8 ビットの写しあり",
    "without copy": "写しなし",
    "no kernel": "カーネルなし",
    "faiss": "faiss",
    "faiss SQ8": "faiss の SQ8",
    "eager model": "eager のモデル",
    "queries/s (× faiss)": "クエリ/秒 (faiss 比)",
    "queries/s, or seconds": "クエリ/秒、または秒",
    "compared with": "比較対象",
    "server: 1 thread searches single queries": "サーバー: 1 スレッドが 1 クエリずつ",
    "server: 4 threads search single queries": "サーバー: 4 スレッドが 1 クエリずつ",
    "server: 8 threads search single queries": "サーバー: 8 スレッドが 1 クエリずつ",
    "1 query, 1 other process busy": "1 クエリ、他に 1 プロセスが計算中",
    "512 queries, 2 other processes busy": "512 クエリ、他に 2 プロセスが計算中",
    "compiled model, 1 query": "コンパイルしたモデル、1 クエリ",
    "compiled model, 512 queries": "コンパイルしたモデル、512 クエリ",
    "`IndexIVFScalarQuantizer`, 1 query": "`IndexIVFScalarQuantizer`、1 クエリ",
    "`IndexIVFScalarQuantizer`, 2,048 queries": "`IndexIVFScalarQuantizer`、2,048 クエリ",
    "exhaustive search, 1 query": "全探索、1 クエリ",
    "exhaustive search, 512 queries": "全探索、512 クエリ",
    "training": "学習",
    "adding": "追加",
    "Slower than what it is compared with: {}.": "比較対象より遅いもの: {}。",
    "{cpu}, {threads} threads, {versions}; {when}, commit {commits}.": (
        "{cpu}、{threads} スレッド、{versions}。{when}、コミット {commits}。"
    ),
    ". ": "。",
    "index": "インデックス",
    "for": "用途",
    "bytes of a vector": "ベクトルのバイト数",
    "queries/s": "クエリ/秒",
    "recall@10": "再現率@10",
    "recall@{}": "再現率@{}",
    "the same with `dtype=torch.float16`": "同じものに `dtype=torch.float16`",
    "the same with `bits=4`": "同じものに `bits=4`",
    "up to some 10,000 vectors, or exact results": "1 万個程度まで、または厳密な結果",
    "more vectors: a query reads `nprobe` of the lists": "それより多いベクトル。クエリは `nprobe` 個のリストを読む",
    "half of the memory": "半分のメモリ",
    "a quarter of the memory: codes of 8 bits": "四分の一のメモリ。8 ビットの符号",
    "the least memory, approximate: codes of 4 bits": "最小のメモリ、近似。4 ビットの符号",
}
