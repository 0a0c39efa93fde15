// Products of a few queries with a few rows, summed in registers.
//
// A sum over thousands of terms in one chain of additions is wrong in the sixth digit. Sums are therefore taken over
// chunks of dimensions, and the totals of the chunks are added: the error of a sum of d terms then grows with the length
// of a chunk plus the number of chunks, not with d.
//
// d dim, M queries, R rows.
#pragma once

#include <array>
#include <cstdint>

#include "rows.h"
#include "simd.h"

namespace torch_ivf_module {

// Rows and queries of one product along d: again twelve sums.
constexpr int kRows = 4;
constexpr int kFew = 3;
// Dimensions of a chunk: one chain of additions a register lane across rows, kLanes of them along a row. Up to two panel
// chunks are left in one chain: at d = 128 chunks of 64 took 20% longer. certify.h derives the rounding bound from these.
constexpr int64_t kPanelChunk = 128;
constexpr int64_t kRowChunk = 32 * kLanes;

// Lay `count` rows (count, d) out as panels (count / kPanel, d, kPanel), zeros behind the last row.
inline void pack_panels(const float* rows, int64_t count, int64_t d, float* panels) {
  for (int64_t first = 0; first < count; first += kPanel, panels += d * kPanel) {
    const int64_t here = std::min(kPanel, count - first);
    const float* from = rows + first * d;
    int64_t packed = 0; // places of full panels that are turned a square at a time
    if (here == kPanel) {
      for (; packed + kLanes <= d; packed += kLanes) {
        for (int64_t row = 0; row < kPanel; row += kLanes) {
          transpose(from + row * d + packed, 4 * d, panels + packed * kPanel + row, kPanel);
        }
      }
    }
    for (int64_t row = 0; row < kPanel; ++row) {
      for (int64_t i = packed; i < d; ++i) {
        panels[i * kPanel + row] = row < here ? from[row * d + i] : 0.0f;
      }
    }
  }
}

// Subtract the origin (d) from panels (count / kPanel, d, kPanel).
inline void centre_panels(float* panels, int64_t count, int64_t d, const float* origin) {
  for (int64_t first = 0; first < count; first += kPanel, panels += d * kPanel) {
    for (int64_t i = 0; i < d; ++i) {
      float* at = panels + i * kPanel;
      const Vec value(origin[i]);
      (Vec::loadu(at) - value).store(at);
      (Vec::loadu(at + kLanes) - value).store(at + kLanes);
    }
  }
}

// Add the products of dimensions [begin, end) of a panel with M queries; sum[m] are the two vectors of query m.
template <int M>
inline void panel_sums(
    const std::array<const float*, kQueries>& queries, const float* panel, int64_t begin, int64_t end, Vec (&sum)[M][2]) {
  for (int64_t i = begin; i < end; ++i) {
    const Vec low = Vec::loadu(panel + i * kPanel);
    const Vec high = Vec::loadu(panel + i * kPanel + kLanes);
    UNROLLED for (int m = 0; m < M; ++m) {
      const Vec value(queries[m][i]);
      sum[m][0] = fmadd(value, low, sum[m][0]);
      sum[m][1] = fmadd(value, high, sum[m][1]);
    }
  }
}

// Add one chunk to totals (M, kPanel) in memory. Not inlined: the registers are the chunk's own.
template <int M>
__attribute__((noinline)) void add_panel_chunk(
    const std::array<const float*, kQueries>& queries, const float* panel, int64_t begin, int64_t end, float* totals) {
  Vec sum[M][2];
  UNROLLED for (int m = 0; m < M; ++m) {
    sum[m][0] = Vec(0.0f);
    sum[m][1] = Vec(0.0f);
  }
  panel_sums<M>(queries, panel, begin, end, sum);
  UNROLLED for (int m = 0; m < M; ++m) {
    (Vec::loadu(totals + m * kPanel) + sum[m][0]).store(totals + m * kPanel);
    (Vec::loadu(totals + m * kPanel + kLanes) + sum[m][1]).store(totals + m * kPanel + kLanes);
  }
}

// Scores of M queries for the rows of a panel, each the bias of the row plus a product: each(m, low, high) is called with
// the two vectors of query m.
template <int M, typename Each>
inline void panel_product(
    const std::array<const float*, kQueries>& queries,
    const float* panel,
    const float* bias,
    int64_t d,
    const Each& each) {
  Vec sum[M][2];
  UNROLLED for (int m = 0; m < M; ++m) {
    sum[m][0] = Vec::loadu(bias);
    sum[m][1] = Vec::loadu(bias + kLanes);
  }
  if (d <= 2 * kPanelChunk) {
    panel_sums<M>(queries, panel, 0, d, sum);
  } else {
    float totals[M * kPanel] = {};
    for (int64_t begin = 0; begin < d; begin += kPanelChunk) {
      add_panel_chunk<M>(queries, panel, begin, std::min(d, begin + kPanelChunk), totals);
    }
    UNROLLED for (int m = 0; m < M; ++m) {
      sum[m][0] = sum[m][0] + Vec::loadu(totals + m * kPanel);
      sum[m][1] = sum[m][1] + Vec::loadu(totals + m * kPanel + kLanes);
    }
  }
  UNROLLED for (int m = 0; m < M; ++m) {
    each(m, sum[m][0], sum[m][1]);
  }
}

// One in the last `count` lanes, zero in the others.
inline Vec last_lanes(int64_t count) {
  float lanes[2 * kLanes] = {};
  Vec(1.0f).store(lanes + kLanes);
  return Vec::loadu(lanes + count);
}

// Sums over one chunk of dimensions, along d, for M queries and kRows rows: of products, or of squared differences. scores
// (M, kRows).
template <int M, bool Differences, typename T>
inline void row_chunk(
    const std::array<const float*, kFew>& queries,
    const std::array<RowReader<T>, kRows>& rows,
    int64_t begin,
    int64_t end,
    float (&scores)[kFew][kRows]) {
  Vec sum[M][kRows];
  UNROLLED for (int m = 0; m < M; ++m) {
    UNROLLED for (int row = 0; row < kRows; ++row) {
      sum[m][row] = Vec(0.0f);
    }
  }
  const auto add = [&](int64_t at, const auto& masked) {
    Vec query[M];
    UNROLLED for (int m = 0; m < M; ++m) {
      query[m] = Vec::loadu(queries[m] + at);
    }
    UNROLLED for (int row = 0; row < kRows; ++row) {
      const Vec value = rows[row].at(at);
      UNROLLED for (int m = 0; m < M; ++m) {
        if constexpr (Differences) {
          const Vec apart = masked(query[m] - value);
          sum[m][row] = fmadd(apart, apart, sum[m][row]);
        } else {
          sum[m][row] = fmadd(masked(query[m]), value, sum[m][row]);
        }
      }
    }
  };
  int64_t i = begin;
  for (; i + kLanes <= end; i += kLanes) {
    add(i, [](Vec values) { return values; });
  }
  if (i < end && end >= kLanes) { // the last whole vector, of which only the last places are new
    const Vec last = last_lanes(end - i);
    add(end - kLanes, [&](Vec values) { return fmadd(values, last, Vec(0.0f)); });
    i = end;
  }
  UNROLLED for (int m = 0; m < M; ++m) {
    sums_of(sum[m], scores[m]);
    for (int64_t j = i; j < end; ++j) {
      UNROLLED for (int row = 0; row < kRows; ++row) {
        const float query = queries[m][j], value = rows[row].number(j);
        scores[m][row] += Differences ? (query - value) * (query - value) : query * value;
      }
    }
  }
}

// Products, or squared distances, of M queries and kRows rows of d numbers: scores (M, kRows).
template <int M, bool Differences, typename T>
inline void row_sums(
    const std::array<const float*, kFew>& queries,
    const std::array<RowReader<T>, kRows>& rows,
    int64_t d,
    float (&scores)[kFew][kRows]) {
  row_chunk<M, Differences, T>(queries, rows, 0, std::min(d, kRowChunk), scores);
  for (int64_t begin = kRowChunk; begin < d; begin += kRowChunk) {
    float chunk[kFew][kRows];
    row_chunk<M, Differences, T>(queries, rows, begin, std::min(d, begin + kRowChunk), chunk);
    UNROLLED for (int m = 0; m < M; ++m) {
      UNROLLED for (int row = 0; row < kRows; ++row) {
        scores[m][row] += chunk[m][row];
      }
    }
  }
}

// One chunk of the exact score of a row: the sum of squared differences, or of products.
template <bool Differences>
float exact_chunk(const float* x, const float* row, int64_t count) {
  Vec sums[2] = {Vec(0.0f), Vec(0.0f)};
  int64_t i = 0;
  const auto add = [&](Vec& sum) {
    const Vec query = Vec::loadu(x + i), value = Vec::loadu(row + i);
    if constexpr (Differences) {
      const Vec apart = query - value;
      sum = fmadd(apart, apart, sum);
    } else {
      sum = fmadd(query, value, sum);
    }
    i += kLanes;
  };
  while (i + 2 * kLanes <= count) {
    add(sums[0]);
    add(sums[1]);
  }
  if (i + kLanes <= count) {
    add(sums[0]);
  }
  float sum = sum_of(sums[0] + sums[1]);
  for (; i < count; ++i) {
    sum += Differences ? (x[i] - row[i]) * (x[i] - row[i]) : x[i] * row[i];
  }
  return sum;
}

// The score of a row as users see it, higher is better: the negated squared distance, or the inner product.
template <bool Differences>
float exact_score(const float* x, const float* row, int64_t d) {
  float sum = 0.0f;
  for (int64_t i = 0; i < d; i += kRowChunk) {
    sum += exact_chunk<Differences>(x + i, row + i, std::min(kRowChunk, d - i));
  }
  return Differences ? -sum : sum;
}

inline float exact_score(bool differences, const float* x, const float* row, int64_t d) {
  return differences ? exact_score<true>(x, row, d) : exact_score<false>(x, row, d);
}

} // namespace torch_ivf_module
