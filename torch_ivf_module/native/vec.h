// Vector registers of the instruction set that this file is compiled for: AVX-512, AVX2 with FMA and F16C, or the four
// lanes of a compiler's own vectors, which are SSE2 on x86-64 and NEON on aarch64.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__AVX2__) || defined(__AVX512F__)
#include <immintrin.h>
#endif

// Sums stay in registers only where every loop over them is unrolled.
#define UNROLLED _Pragma("GCC unroll 16")

namespace torch_ivf_module {

#if defined(__AVX512F__)
constexpr int64_t kLanes = 16;
#elif defined(__AVX2__)
constexpr int64_t kLanes = 8;
#else
constexpr int64_t kLanes = 4;
#endif

struct Vec {
  using Lanes = float __attribute__((vector_size(4 * kLanes)));

  Lanes lanes;

  Vec() = default;
  Vec(Lanes values) : lanes(values) {}
  explicit Vec(float value) : lanes(value - Lanes{}) {}

  static Vec loadu(const float* from) {
    Vec out;
    std::memcpy(&out.lanes, from, sizeof(Lanes));
    return out;
  }

  void store(float* to) const {
    std::memcpy(to, &lanes, sizeof(Lanes));
  }

  friend Vec operator+(Vec a, Vec b) {
    return a.lanes + b.lanes;
  }

  friend Vec operator-(Vec a, Vec b) {
    return a.lanes - b.lanes;
  }
};

// a b + c, rounded once where the instruction set has it.
inline Vec fmadd(Vec a, Vec b, Vec c) {
#if defined(__AVX512F__)
  return _mm512_fmadd_ps(a.lanes, b.lanes, c.lanes);
#elif defined(__AVX2__)
  return _mm256_fmadd_ps(a.lanes, b.lanes, c.lanes);
#else
  return a.lanes * b.lanes + c.lanes;
#endif
}

// One bit for each score above the threshold.
inline unsigned exceeding(Vec scores, Vec threshold) {
#if defined(__AVX512F__)
  return _mm512_cmp_ps_mask(scores.lanes, threshold.lanes, _CMP_GT_OQ);
#elif defined(__AVX2__)
  return static_cast<unsigned>(_mm256_movemask_ps(_mm256_cmp_ps(scores.lanes, threshold.lanes, _CMP_GT_OQ)));
#else
  const auto above = scores.lanes > threshold.lanes; // -1 where it is so
  return (above[0] & 1) | (above[1] & 2) | (above[2] & 4) | (above[3] & 8);
#endif
}

// The numbers whose bit is set, one after the other from `to` on, where there is room for kLanes.
template <typename T>
inline void store_some(const T* from, unsigned which, T* to) {
  static_assert(sizeof(T) == 4);
#if defined(__AVX512F__)
  _mm512_storeu_si512(to, _mm512_maskz_compress_epi32(static_cast<__mmask16>(which), _mm512_loadu_si512(from)));
#else
  for (int i = 0; i < kLanes; ++i) {
    *to = from[i];
    to += which >> i & 1;
  }
#endif
}

#if !defined(__AVX2__) && !defined(__AVX512F__)
#if defined(__clang__) || __GNUC__ >= 12
#define INTERLEAVED(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define INTERLEAVED(a, b, ...) __builtin_shuffle(a, b, Places{__VA_ARGS__})
#endif

// The transpose of four vectors.
inline void turn(Vec::Lanes (&rows)[4]) {
  using Places [[maybe_unused]] = int32_t __attribute__((vector_size(16)));
  const Vec::Lanes even[2] = {INTERLEAVED(rows[0], rows[2], 0, 4, 1, 5), INTERLEAVED(rows[0], rows[2], 2, 6, 3, 7)};
  const Vec::Lanes odd[2] = {INTERLEAVED(rows[1], rows[3], 0, 4, 1, 5), INTERLEAVED(rows[1], rows[3], 2, 6, 3, 7)};
  for (int i = 0; i < 2; ++i) {
    rows[2 * i] = INTERLEAVED(even[i], odd[i], 0, 4, 1, 5);
    rows[2 * i + 1] = INTERLEAVED(even[i], odd[i], 2, 6, 3, 7);
  }
}

#undef INTERLEAVED
#endif

// The sum of each of four vectors.
inline void sums_of(const Vec (&values)[4], float* out) {
#if defined(__AVX512F__) || defined(__AVX2__)
  __m256 part[4];
  UNROLLED for (int i = 0; i < 4; ++i) {
#if defined(__AVX512F__)
    part[i] = _mm256_add_ps(_mm512_castps512_ps256(values[i].lanes), _mm512_extractf32x8_ps(values[i].lanes, 1));
#else
    part[i] = values[i].lanes;
#endif
  }
  const __m256 pairs = _mm256_hadd_ps(_mm256_hadd_ps(part[0], part[1]), _mm256_hadd_ps(part[2], part[3]));
  _mm_storeu_ps(out, _mm_add_ps(_mm256_castps256_ps128(pairs), _mm256_extractf128_ps(pairs, 1)));
#else
  Vec::Lanes turned[4] = {values[0].lanes, values[1].lanes, values[2].lanes, values[3].lanes};
  turn(turned);
  Vec((turned[0] + turned[1]) + (turned[2] + turned[3])).store(out);
#endif
}

inline float sum_of(Vec value) {
#if defined(__AVX512F__)
  return _mm512_reduce_add_ps(value.lanes);
#else
  float sums[kLanes];
  value.store(sums);
  UNROLLED for (int64_t half = kLanes / 2; half > 0; half /= 2) {
    UNROLLED for (int64_t i = 0; i < half; ++i) {
      sums[i] += sums[i + half];
    }
  }
  return sums[0];
#endif
}

// The transpose of kLanes x kLanes numbers of 32 bits, rows `stride` bytes apart, into rows `step` numbers apart.
inline void transpose(const void* from, int64_t stride, float* to, int64_t step) {
  Vec::Lanes row[kLanes];
  UNROLLED for (int i = 0; i < kLanes; ++i) {
    std::memcpy(&row[i], static_cast<const char*>(from) + i * stride, sizeof(row[i]));
  }
#if defined(__AVX512F__)
  // Of each group of four rows, blocks of 4 x 4 turned; then the blocks.
  Vec::Lanes block[16];
  UNROLLED for (int i = 0; i < 16; i += 4) {
    const __m512d low[2] = {
        _mm512_castps_pd(_mm512_unpacklo_ps(row[i], row[i + 1])),
        _mm512_castps_pd(_mm512_unpacklo_ps(row[i + 2], row[i + 3]))};
    const __m512d high[2] = {
        _mm512_castps_pd(_mm512_unpackhi_ps(row[i], row[i + 1])),
        _mm512_castps_pd(_mm512_unpackhi_ps(row[i + 2], row[i + 3]))};
    block[i] = _mm512_castpd_ps(_mm512_unpacklo_pd(low[0], low[1]));
    block[i + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(low[0], low[1]));
    block[i + 2] = _mm512_castpd_ps(_mm512_unpacklo_pd(high[0], high[1]));
    block[i + 3] = _mm512_castpd_ps(_mm512_unpackhi_pd(high[0], high[1]));
  }
  UNROLLED for (int i = 0; i < 4; ++i) {
    const __m512 first[2] = {
        _mm512_shuffle_f32x4(block[i], block[i + 4], 0x88), _mm512_shuffle_f32x4(block[i], block[i + 4], 0xdd)};
    const __m512 last[2] = {
        _mm512_shuffle_f32x4(block[i + 8], block[i + 12], 0x88),
        _mm512_shuffle_f32x4(block[i + 8], block[i + 12], 0xdd)};
    row[i] = _mm512_shuffle_f32x4(first[0], last[0], 0x88);
    row[i + 4] = _mm512_shuffle_f32x4(first[1], last[1], 0x88);
    row[i + 8] = _mm512_shuffle_f32x4(first[0], last[0], 0xdd);
    row[i + 12] = _mm512_shuffle_f32x4(first[1], last[1], 0xdd);
  }
#elif defined(__AVX2__)
  Vec::Lanes block[8];
  UNROLLED for (int i = 0; i < 8; i += 4) {
    const __m256d low[2] = {
        _mm256_castps_pd(_mm256_unpacklo_ps(row[i], row[i + 1])),
        _mm256_castps_pd(_mm256_unpacklo_ps(row[i + 2], row[i + 3]))};
    const __m256d high[2] = {
        _mm256_castps_pd(_mm256_unpackhi_ps(row[i], row[i + 1])),
        _mm256_castps_pd(_mm256_unpackhi_ps(row[i + 2], row[i + 3]))};
    block[i] = _mm256_castpd_ps(_mm256_unpacklo_pd(low[0], low[1]));
    block[i + 1] = _mm256_castpd_ps(_mm256_unpackhi_pd(low[0], low[1]));
    block[i + 2] = _mm256_castpd_ps(_mm256_unpacklo_pd(high[0], high[1]));
    block[i + 3] = _mm256_castpd_ps(_mm256_unpackhi_pd(high[0], high[1]));
  }
  UNROLLED for (int i = 0; i < 4; ++i) {
    row[i] = _mm256_permute2f128_ps(block[i], block[i + 4], 0x20);
    row[i + 4] = _mm256_permute2f128_ps(block[i], block[i + 4], 0x31);
  }
#else
  turn(row);
#endif
  UNROLLED for (int i = 0; i < kLanes; ++i) {
    Vec(row[i]).store(to + i * step);
  }
}

} // namespace torch_ivf_module
