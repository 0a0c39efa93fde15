// What kernel.cpp, which knows of torch, asks of core.cpp, which knows of memory only and is compiled once for each
// instruction set.
//
// Q queries, L lists, P probes, N vectors, d dim, k results, H hits.
#pragma once

#include <cstdint>
#include <functional>

namespace torch_ivf_module {

struct Problem {
  const float* x; // (Q, d) as they are multiplied: relative to the origin for l2
  const float* bias; // (N,) or null
  const int64_t* offsets; // (L + 1,)
  const int64_t* sizes; // (L + 1,)
  const int64_t* probed; // (Q, P)
  const int64_t* limits; // (Q, P) or null
  int64_t queries, lists, probes, d, k;
};

// The vectors (N, d), as they are stored.
struct Rows {
  enum Dtype { kFloat32, kFloat16, kBFloat16 } dtype;
  const void* data;
};

// The k best rows of each query: scores and rows (Q, k), best first, padded with -inf and -1.
struct Best {
  float* scores;
  int64_t* rows;
};

struct Core {
  const char* isa;

  // By ranking score, with at most `max_bytes` for what is kept of queries.
  void (*scan)(const Problem&, const Rows&, int64_t max_bytes, Best);

  // By exact score, which does not depend on rounding in the scan. Queries `x` are not relative to the origin (d).
  // `kept` candidates are ranked. again (Q,) tells which queries took a second pass, or have products that overflow.
  void (*search_lists)(
      const Problem&, const Rows&, const float* origin, int64_t kept, bool differences, int64_t max_bytes, Best,
      bool* again);

  // Rows with a ranking score above the query's threshold (Q,), query by query: lims (Q + 1,), and the rows (H,) into
  // the memory that rows_of(H) returns.
  void (*scan_above)(
      const Problem&, const Rows&, const float* threshold, int64_t* lims,
      const std::function<int64_t*(int64_t)>& rows_of);
};

} // namespace torch_ivf_module
