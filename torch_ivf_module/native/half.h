// Numbers of 16 bits as vectors are stored, and their conversion to float32.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__F16C__)
#include <immintrin.h>
#endif

namespace torch_ivf_module {

struct Half {
  uint16_t bits;
};

struct BFloat16 {
  uint16_t bits;
};

inline float float_of(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof(value));
  return value;
}

inline float widened(BFloat16 value) {
  return float_of(static_cast<uint32_t>(value.bits) << 16);
}

// Without float32 numbers below the smallest normal one, which torch.set_flush_denormal turns into zeros.
inline float widened(Half value) {
  const uint32_t sign = static_cast<uint32_t>(value.bits & 0x8000) << 16;
  const uint32_t exponent = value.bits & 0x7c00, shifted = static_cast<uint32_t>(value.bits & 0x7fff) << 13;
  const float smallest = 0x1p-14f; // of the normal numbers of 16 bits
  const float denormal = float_of(shifted + (113u << 23)) - smallest;
  uint32_t bits = shifted + (exponent == 0x7c00 ? 224u << 23 : 112u << 23);
  uint32_t below;
  std::memcpy(&below, &denormal, sizeof(below));
  bits = exponent == 0 ? below : bits;
  return float_of(bits | sign);
}

// Rows as float32: where they lie, or converted into `scratch`.
inline const float* as_float(const float* rows, int64_t, float*) {
  return rows;
}

inline const float* as_float(const BFloat16* rows, int64_t count, float* scratch) {
  for (int64_t i = 0; i < count; ++i) {
    scratch[i] = widened(rows[i]);
  }
  return scratch;
}

inline const float* as_float(const Half* rows, int64_t count, float* scratch) {
  int64_t i = 0;
#if defined(__F16C__)
  for (; i + 8 <= count; i += 8) {
    _mm256_storeu_ps(scratch + i, _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(rows + i))));
  }
#endif
  for (; i < count; ++i) {
    scratch[i] = widened(rows[i]);
  }
  return scratch;
}

} // namespace torch_ivf_module
