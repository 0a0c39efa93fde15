// Products of a few queries with a few rows, kept in registers and handed on from there.
//
// d dim, M queries, R rows.
#pragma once

#include <ATen/cpu/vec/functional.h>
#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>

#include <array>
#include <cstdint>

#include "offer.h"

namespace torch_ivf_module {

// Rows and queries of one product along d: again twelve sums.
constexpr int kRows = 4;
constexpr int kFew = 3;

// Rows as float32: where they lie, or converted into `scratch`.
inline const float* as_float(const float* rows, int64_t, float*) {
  return rows;
}

template <typename T>
const float* as_float(const T* rows, int64_t count, float* scratch) {
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) {
    Vec values;
    if constexpr (std::is_same_v<T, c10::Half>) {
      at::vec::load_fp32_from_fp16(rows + i, values);
    } else {
      at::vec::load_fp32_from_bf16(rows + i, values);
    }
    values.store(scratch + i);
  }
  for (; i < count; ++i) {
    scratch[i] = static_cast<float>(rows[i]);
  }
  return scratch;
}

// Lay `count` rows (count, d) out as panels (count / kPanel, d, kPanel), zeros behind the last row.
inline void pack_panels(const float* rows, int64_t count, int64_t d, float* panels) {
  for (int64_t first = 0; first < count; first += kPanel, panels += d * kPanel) {
    const int64_t here = std::min(kPanel, count - first);
    const float* from = rows + first * d;
    int64_t packed = 0; // places of full panels that are turned a square at a time
#if defined(CPU_CAPABILITY_AVX2) || defined(CPU_CAPABILITY_AVX512)
    if (here == kPanel) {
      for (; packed + kLanes <= d; packed += kLanes) {
        for (int64_t row = 0; row < kPanel; row += kLanes) {
          at::vec::transpose_mxn<float, kLanes, kLanes>(
              from + row * d + packed, d, panels + packed * kPanel + row, kPanel);
        }
      }
    }
#endif
    for (int64_t row = 0; row < kPanel; ++row) {
      for (int64_t i = packed; i < d; ++i) {
        panels[i * kPanel + row] = row < here ? from[row * d + i] : 0.0f;
      }
    }
  }
}

// Scores of M queries for the rows of a panel, each the bias of the row and a product: each(m, low, high) is called with
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
  for (int64_t i = 0; i < d; ++i) {
    const Vec low = Vec::loadu(panel + i * kPanel);
    const Vec high = Vec::loadu(panel + i * kPanel + kLanes);
    UNROLLED for (int m = 0; m < M; ++m) {
      const Vec value(queries[m][i]);
      sum[m][0] = at::vec::fmadd(value, low, sum[m][0]);
      sum[m][1] = at::vec::fmadd(value, high, sum[m][1]);
    }
  }
  UNROLLED for (int m = 0; m < M; ++m) {
    each(m, sum[m][0], sum[m][1]);
  }
}

// The sum of each of four vectors.
inline void sums_of(const Vec (&values)[kRows], float* out) {
#if defined(CPU_CAPABILITY_AVX2)
  const __m256 pairs = _mm256_hadd_ps(_mm256_hadd_ps(values[0], values[1]), _mm256_hadd_ps(values[2], values[3]));
  _mm_storeu_ps(out, _mm_add_ps(_mm256_castps256_ps128(pairs), _mm256_extractf128_ps(pairs, 1)));
#else
  UNROLLED for (int row = 0; row < kRows; ++row) {
    out[row] = sum_of(values[row]);
  }
#endif
}

// Products of M queries with kRows rows, each taken along d: scores (M, kRows).
template <int M>
inline void row_product(
    const std::array<const float*, kFew>& queries,
    const std::array<const float*, kRows>& rows,
    int64_t d,
    float (&scores)[kFew][kRows]) {
  Vec sum[M][kRows];
  UNROLLED for (int m = 0; m < M; ++m) {
    UNROLLED for (int row = 0; row < kRows; ++row) {
      sum[m][row] = Vec(0.0f);
    }
  }
  int64_t i = 0;
  for (; i + kLanes <= d; i += kLanes) {
    Vec query[M];
    UNROLLED for (int m = 0; m < M; ++m) {
      query[m] = Vec::loadu(queries[m] + i);
    }
    UNROLLED for (int row = 0; row < kRows; ++row) {
      const Vec value = Vec::loadu(rows[row] + i);
      UNROLLED for (int m = 0; m < M; ++m) {
        sum[m][row] = at::vec::fmadd(query[m], value, sum[m][row]);
      }
    }
  }
  UNROLLED for (int m = 0; m < M; ++m) {
    sums_of(sum[m], scores[m]);
    for (int64_t j = i; j < d; ++j) {
      UNROLLED for (int row = 0; row < kRows; ++row) {
        scores[m][row] += queries[m][j] * rows[row][j];
      }
    }
  }
}

} // namespace torch_ivf_module
