// Products of bytes: unsigned codes of rows with signed codes of queries, four at a time, summed in 32 bits.
#pragma once

#include <algorithm>

#include "vec.h"

namespace torch_ivf_module {

// The largest code of a query. Where two products are added in 16 bits, 2 * 255 * 63 still fits.
#if (defined(__AVX2__) || defined(__AVX512F__)) && !defined(__AVX512VNNI__) && !defined(__AVXVNNI__)
constexpr int kQueryLevels = 63;
#else
constexpr int kQueryLevels = 127;
#endif

// kLanes numbers of 32 bits, or four times as many of 8 bits.
struct Ints {
  using Lanes = int32_t __attribute__((vector_size(4 * kLanes)));

  Lanes lanes;

  Ints() = default;
  Ints(Lanes values) : lanes(values) {}
  explicit Ints(int32_t value) : lanes(value - Lanes{}) {}

  static Ints loadu(const void* from) {
    Ints out;
    std::memcpy(&out.lanes, from, sizeof(Lanes));
    return out;
  }
};

inline Vec as_floats(Ints values) {
  return __builtin_convertvector(values.lanes, Vec::Lanes);
}

// Add to each of kLanes sums the product of four unsigned codes of a row with four signed ones of a query. In assembly,
// since GCC 12 copies the sums to memory and back around the intrinsics.
inline __attribute__((always_inline)) void add_dot(Ints::Lanes& sums, Ints rows, Ints query) {
#if defined(__AVX512VNNI__)
  __asm__("vpdpbusd %2, %1, %0" : "+v"(sums) : "v"(rows.lanes), "v"(query.lanes));
#elif defined(__AVXVNNI__)
  __asm__("%{vex%} vpdpbusd %2, %1, %0" : "+x"(sums) : "x"(rows.lanes), "x"(query.lanes));
#elif defined(__AVX512F__)
  const __m512i pairs = _mm512_maddubs_epi16((__m512i)rows.lanes, (__m512i)query.lanes);
  sums += (Ints::Lanes)_mm512_madd_epi16(pairs, _mm512_set1_epi16(1));
#elif defined(__AVX2__)
  const __m256i pairs = _mm256_maddubs_epi16((__m256i)rows.lanes, (__m256i)query.lanes);
  sums += (Ints::Lanes)_mm256_madd_epi16(pairs, _mm256_set1_epi16(1));
#else
  uint8_t code[4 * kLanes];
  int8_t factor[4 * kLanes];
  std::memcpy(code, &rows.lanes, sizeof(code));
  std::memcpy(factor, &query.lanes, sizeof(factor));
  int32_t out[kLanes];
  for (int64_t i = 0; i < kLanes; ++i) {
    out[i] = code[4 * i] * factor[4 * i] + code[4 * i + 1] * factor[4 * i + 1] + code[4 * i + 2] * factor[4 * i + 2] +
        code[4 * i + 3] * factor[4 * i + 3];
  }
  sums += Ints::loadu(out).lanes;
#endif
}

inline Vec absolute(Vec value) {
  return (Vec::Lanes)((Ints::Lanes)value.lanes & 0x7fffffff);
}

inline Vec larger(Vec a, Vec b) {
#if defined(__AVX512F__)
  return _mm512_max_ps(a.lanes, b.lanes);
#elif defined(__AVX2__)
  return _mm256_max_ps(a.lanes, b.lanes);
#else
  return a.lanes > b.lanes ? a.lanes : b.lanes;
#endif
}

inline Vec smaller(Vec a, Vec b) {
  return Vec(0.0f) - larger(Vec(0.0f) - a, Vec(0.0f) - b);
}

inline float largest_of(Vec value) {
#if defined(__AVX512F__)
  return _mm512_reduce_max_ps(value.lanes);
#else
  float lanes[kLanes];
  value.store(lanes);
  return *std::max_element(lanes, lanes + kLanes);
#endif
}

inline float least_of(Vec value) {
  return -largest_of(Vec(0.0f) - value);
}

inline int32_t sum_of(Ints value) {
#if defined(__AVX512F__)
  return _mm512_reduce_add_epi32((__m512i)value.lanes);
#else
  int32_t lanes[kLanes], sum = 0;
  std::memcpy(lanes, &value.lanes, sizeof(lanes));
  for (int32_t lane : lanes) {
    sum += lane;
  }
  return sum;
#endif
}

// The lowest byte of each number.
inline void store_bytes(Ints value, int8_t* to) {
#if defined(__AVX512F__)
  _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm512_cvtepi32_epi8((__m512i)value.lanes));
#else
  int32_t lanes[kLanes];
  std::memcpy(lanes, &value.lanes, sizeof(lanes));
  for (int64_t i = 0; i < kLanes; ++i) {
    to[i] = static_cast<int8_t>(lanes[i]);
  }
#endif
}

// The nearest integers of numbers below 2^22 in size: an addition rounds them into the lowest bits.
inline Ints rounded(Vec value) {
  const float shift = 0x1.8p23f;
  return (Ints::Lanes)(value + Vec(shift)).lanes - 0x4b400000;
}

} // namespace torch_ivf_module
