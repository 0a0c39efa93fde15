// What kernel.cpp, which knows of torch, asks of core.cpp, which knows of memory only and is compiled once for each
// instruction set.
//
// Q queries, L lists, P probes, N vectors, d dim, k results, H hits, S segments (sets of inverted lists over the same
// centroids, whose rows are counted on from one to the next).
#pragma once

#include <algorithm>
#include <array>
#include <cstdint>
#include <functional>

namespace torch_ivf_module {

constexpr int kMostSegments = 2;

enum class Dtype { kFloat32, kFloat16, kBFloat16, kCode8, kCode4 };

// Inverted lists: see functional/lists.py. Of the lists, those are checked that are read.
struct Segment {
  const void* packed; // (N, d), or (N, W) of coded rows
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

// Ascending ids.
struct IdRange {
  const int64_t *first, *last;

  bool contains(int64_t id) const {
    return std::binary_search(first, last, id);
  }
};

// Which ids a query may find: see functional/filters.py.
struct Filter {
  const bool* mask; // an entry for each id below `ids`, others may not be found; or null
  const uint64_t* bits; // the same in bits
  int64_t ids;
  bool listed; // whether only `allowed` ids may be found
  IdRange allowed, excluded;

  // Whether the masks allow the id, without a branch on their values.
  bool in_masks(int64_t id) const {
    const bool inside = static_cast<uint64_t>(id) < static_cast<uint64_t>(ids);
    const int64_t at = inside ? id : 0;
    return mask ? inside & mask[at] : bits ? inside & (bits[at >> 6] >> (at & 63)) : true;
  }

  bool in_lists(int64_t id) const {
    return (!listed || allowed.contains(id)) && !excluded.contains(id);
  }

  bool passes(int64_t id) const {
    return in_masks(id) && in_lists(id);
  }
};

// Which rows some queries may find, each counted from a first one.
struct RowFilter {
  const Filter* filters; // null for all rows
  const int64_t* ids; // of the rows

  bool passes(int64_t query, int64_t row) const {
    return !filters || filters[query].passes(ids[row]);
  }
};

// Queries and the lists that they read.
struct Problem {
  const float* x; // (Q, d)
  std::array<Segment, kMostSegments> segments;
  int segment_count; // S
  Dtype dtype; // of all packed rows
  int64_t row_bytes;
  const int64_t* probed; // (Q, P), L for no list; no query reads a list twice
  const int64_t* limits; // (Q, P) rows to read of each list, counted on from segment to segment; or null
  const Filter* filters; // (Q,) or null
  int64_t listed_ids; // all ids that are allowed by lists are below this, and none is negative; or 0
  int64_t queries, lists, probes, d, k;
  Limits within;
  bool coded; // whether the rows of the first segment are read as codes

  // Rows of the segments before this one.
  int64_t rows_before(int segment) const {
    return segment == 0 ? 0 : segments[0].rows;
  }

  // Which rows of a segment, counted from `start` on, the queries from `query` on may find.
  RowFilter filter(int64_t query, const Segment& segment, int64_t start) const {
    return {filters ? filters + query : nullptr, filters ? segment.ids + start : nullptr};
  }

  // A row that counts on from segment to segment.
  template <typename T>
  const T* row(int64_t number) const {
    const bool second = segment_count > 1 && number >= segments[0].rows;
    const int64_t local = second ? number - segments[0].rows : number;
    return reinterpret_cast<const T*>(static_cast<const char*>(segments[second].packed) + local * row_bytes);
  }
};

// The k best rows of each query, best first, padded with -inf and -1.
struct Best {
  float* scores; // (Q, k)
  int64_t* rows; // (Q, k)
};

// Panels of codes: see Panel in codes.h.
constexpr int64_t kCodedRows = 32, kPanelHead = kCodedRows * 10;
constexpr int64_t kMostCodedDim = 1 << 15; // sums of products of bytes fit into 32 bits

inline int64_t panel_bytes(int64_t d) {
  return kPanelHead + (d + 3) / 4 * 4 * kCodedRows;
}

// 8-bit codes of the packed rows of a segment: see functional/codec.py.
struct Codes {
  const float* centres; // (L, d)
  const uint8_t* panels; // (P * panel_bytes(d),)
  const int64_t* first; // (L + 1,) number of the first panel of each list
  const float* norms; // (P, 2) least and largest norm of the residuals of a panel
  const float* limits; // (L, 3) kappa, a norm amid those of the residuals, and the norm of the centre
};

// Search by codes: see codes_search.h.
using SearchCodes = void (*)(const Problem&, const float* x, const Codes&, bool differences, Best, int64_t* scored);
using SearchCodedRows = void (*)(const Problem&, const float* x, const float* origin, Best, int64_t* scored);

// The coarse quantizer: see functional/probe.py.
struct Coarse {
  const float* centroids; // (L, d)
  const float* bias; // (L,) or null
  const float* origin; // (d,)
  int64_t lists; // L
  Codes codes; // of the centroids as one list; without panels where there are none
  SearchCodes search_codes;
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
  const Codes* codes; // of the first segment, or null
  SearchCodes search_codes;
  SearchCodedRows search_coded_rows; // null where rows are not coded
};

struct Answer {
  Best best;
  int64_t* ids; // (Q, k)
  bool* again; // (Q,) took a second pass; or, where exact scores are products, has products that overflow
  int64_t* scored; // (Q,) rows scored exactly since codes did not rule them out, or few pass; 0 of rows without codes
};

struct Core {
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

// What encoding writes, see Codes. `first` is given.
struct EncodedLists {
  float* centres;
  uint8_t* panels;
  const int64_t* first;
  float* norms;
  float* limits;
};

// The part that is compiled for more instruction sets: those that multiply bytes.
struct CodesCore {
  // Codes of inverted lists, `count` of them: see encode.h.
  void (*encode)(const Segment&, Dtype, int64_t count, int64_t d, int64_t threads, const EncodedLists&);

  SearchCodes search;
  SearchCodedRows search_coded_rows;
};

} // namespace torch_ivf_module
