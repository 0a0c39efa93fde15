// What kernel.cpp, which knows of torch, asks of core.cpp, which knows of memory only and is compiled once for each
// instruction set.
//
// Q queries, L lists, P probes, N vectors, d dim, k results, H hits, S segments (sets of inverted lists over the same
// centroids, whose rows are counted on from one to the next).
#pragma once

#include <array>
#include <cstdint>
#include <functional>

namespace torch_ivf_module {

constexpr int kMostSegments = 2;

enum class Dtype { kFloat32, kFloat16, kBFloat16 };

// Inverted lists: see functional/lists.py. Of the lists, those are checked that are read.
struct Segment {
  const void* packed; // (N, d)
  const float* bias; // (N,) or null
  const int64_t* offsets; // (L + 1,)
  const int64_t* sizes; // (L + 1,)
  const int64_t* ids; // (N,), or null where only rows are asked for
  int64_t rows; // N
};

struct Limits {
  int64_t threads;
  int64_t max_bytes; // of workspace
};

// Queries and the lists that they read.
struct Problem {
  const float* x; // (Q, d)
  std::array<Segment, kMostSegments> segments;
  int segment_count; // S
  Dtype dtype; // of all packed vectors
  const int64_t* probed; // (Q, P), L for no list; no query reads a list twice
  const int64_t* limits; // (Q, P) rows to read of each list, counted on from segment to segment; or null
  int64_t queries, lists, probes, d, k;
  Limits within;

  // Rows of the segments before this one.
  int64_t rows_before(int segment) const {
    return segment == 0 ? 0 : segments[0].rows;
  }

  // The vector of a row that counts on from segment to segment.
  template <typename T>
  const T* vector(int64_t row) const {
    const bool second = segment_count > 1 && row >= segments[0].rows;
    return static_cast<const T*>(segments[second].packed) + (second ? row - segments[0].rows : row) * d;
  }

  int64_t row_bytes() const {
    return d * (dtype == Dtype::kFloat32 ? 4 : 2);
  }
};

// The coarse quantizer: see functional/probe.py.
struct Coarse {
  const float* centroids; // (L, d)
  const float* bias; // (L,) or null
  const float* origin; // (d,)
  int64_t lists; // L
};

// The k best rows of each query, best first, padded with -inf and -1.
struct Best {
  float* scores; // (Q, k)
  int64_t* rows; // (Q, k)
};

// A search by exact scores, which do not depend on rounding in the scan.
struct Request {
  // Queries as functional/metric.py prepares them; probed and probes only where the lists are given.
  Problem problem;
  Coarse coarse;
  int64_t nprobe; // lists to choose, 0 where they are given
  int64_t max_codes; // a cap on the rows of chosen lists, 0 for none
  int64_t kept; // candidates a query that are scored exactly, at least k
  bool differences; // whether exact scores come from differences of vectors, and not from products
};

struct Answer {
  Best best;
  int64_t* ids; // (Q, k)
  bool* again; // (Q,) took a second pass; or, where exact scores are products, has products that overflow
};

struct Core {
  const char* isa;

  // A whole search: probe, scan, certify, exact scores, selection, ids.
  void (*search)(const Request&, const Answer&);

  // The nearest of the lists (Q, P), nearest first, with exact scores: of finite queries x (Q, d), for P at most L.
  void (*probe)(
      const Coarse&, const float* x, int64_t queries, int64_t d, int64_t probes, bool differences, Limits, Best);

  // The k best rows by ranking score.
  void (*scan)(const Problem&, Best);

  // Rows with a ranking score above the query's threshold (Q,), query by query: lims (Q + 1,), and the rows (H,) into
  // the memory that rows_of(H) returns.
  void (*scan_above)(
      const Problem&, const float* threshold, int64_t* lims, const std::function<int64_t*(int64_t)>& rows_of);
};

} // namespace torch_ivf_module
