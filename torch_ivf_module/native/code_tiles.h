// Products of some coded queries with the codes of a few rows, and the test of the bounds that follow from them.
//
// M queries.
#pragma once

#include "codes.h"
#include "simd.h"

namespace torch_ivf_module {

// Vectors of rows that are multiplied at a time, and queries: twelve or twenty-four sums in registers.
constexpr int kCodeVectors = 2;
constexpr int64_t kTileRows = kCodeVectors * kLanes;
static_assert(kCodedRows % kTileRows == 0);

// Codes of up to kQueries queries, (groups, kQueries) of four each.
inline void write_query_codes(const int8_t* from, int64_t groups, int32_t* to) {
  for (int64_t group = groups; group > 0; --group, from += 4, to += kQueries) {
    std::memcpy(to, from, 4);
  }
}

// A bit for each of 32 numbers that is not zero.
inline uint32_t not_zero(const uint16_t* numbers) {
#if defined(__AVX512F__)
  const __m512i all = _mm512_load_si512(numbers);
  return _mm512_test_epi16_mask(all, all);
#else
  uint32_t which = 0;
  for (int i = 0; i < kQueries * kCodeVectors; ++i) {
    which |= static_cast<uint32_t>(numbers[i] != 0) << i;
  }
  return which;
#endif
}

// kTileRows rows, `rows` those of the first four dimensions of a panel, with M queries of one or two codes a number, whose
// sums begin at `start`. bounds() returns bound(m, v, products with the first codes, with the last) of query m and vector v
// of rows; offer(m, v, bound, which) is called where some rows exceed what the query needs. To be inlined into a function
// that is not: the sums then stay in registers.
template <int M, int Codes, typename Bounds, typename Offer>
inline __attribute__((always_inline)) void scan_tile(
    const uint8_t* rows, const int32_t* queries, const int32_t* start, const float* needed, int64_t groups, int64_t ahead,
    const Bounds& bounds, const Offer& offer) {
  Ints::Lanes sum[M * Codes][kCodeVectors]; // a struct of them would not stay in registers
  UNROLLED for (int i = 0; i < M * Codes; ++i) {
    UNROLLED for (int v = 0; v < kCodeVectors; ++v) {
      sum[i][v] = Ints(start[i]).lanes;
    }
  }
  for (int64_t group = groups; group > 0; --group, rows += Panel::kGroup, queries += kQueries) {
    Ints codes[kCodeVectors];
    UNROLLED for (int v = 0; v < kCodeVectors; ++v) {
      codes[v] = Ints::loadu(rows + 4 * kLanes * v);
      if (M * Codes <= 3) {
        __builtin_prefetch(rows + 4 * kLanes * v + ahead);
      }
    }
    UNROLLED for (int i = 0; i < M * Codes; ++i) {
      const Ints four(queries[i]);
      UNROLLED for (int v = 0; v < kCodeVectors; ++v) {
        add_dot(sum[i][v], codes[v], four);
      }
    }
  }
  const auto bound = bounds();
  alignas(64) float reached[M * kCodeVectors][kLanes];
  alignas(64) uint16_t above[32];
  if (M * kCodeVectors < 32) {
    std::memset(above, 0, sizeof(above));
  }
  UNROLLED for (int m = 0; m < M; ++m) {
    UNROLLED for (int v = 0; v < kCodeVectors; ++v) {
      const int last = m * Codes + Codes - 1;
      const Vec most = bound(m, v, as_floats(sum[m * Codes][v]), as_floats(sum[last][v]));
      most.store(reached[m * kCodeVectors + v]);
      above[m * kCodeVectors + v] = static_cast<uint16_t>(exceeding(most, Vec(needed[m])));
    }
  }
  // One branch for all of them: most exceed nothing.
  for (uint32_t which = not_zero(above); which; which &= which - 1) {
    const int i = __builtin_ctz(which);
    offer(i / kCodeVectors, i % kCodeVectors, Vec::loadu(reached[i]), above[i]);
  }
}

} // namespace torch_ivf_module
