// Rows as they are stored, numbers of 32 or 16 bits or codes, and their conversion to float32.
#pragma once

#include <cstdint>
#include <cstring>

#include "core.h"

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

// One byte of a coded row: codes of 8 bits, or two of 4 bits with the first in the low half, then the scale and the offset
// of the row as float32. An entry is offset + scale * code: see functional/row_codes.py.
struct Code8 {
  uint8_t byte;
};

struct Code4 {
  uint8_t byte;
};

template <typename T>
inline int64_t row_bytes(int64_t d) {
  return d * static_cast<int64_t>(sizeof(T));
}

constexpr int64_t kRangeBytes = 8;

template <>
inline int64_t row_bytes<Code8>(int64_t d) {
  return d + kRangeBytes;
}

template <>
inline int64_t row_bytes<Code4>(int64_t d) {
  return (d + 1) / 2 + kRangeBytes;
}

template <typename T>
inline const T* row_at(const void* rows, int64_t row, int64_t d) {
  return reinterpret_cast<const T*>(static_cast<const char*>(rows) + row * row_bytes<T>(d));
}

// Rows as float32 (count, d): where they lie, or converted into `scratch`.
inline const float* as_float(const float* rows, int64_t, int64_t, float*) {
  return rows;
}

inline const float* as_float(const BFloat16* rows, int64_t count, int64_t d, float* scratch) {
  for (int64_t i = 0; i < count * d; ++i) {
    scratch[i] = widened(rows[i]);
  }
  return scratch;
}

inline const float* as_float(const Half* rows, int64_t count, int64_t d, float* scratch) {
  int64_t i = 0;
#if defined(__F16C__)
  for (; i + 8 <= count * d; i += 8) {
    _mm256_storeu_ps(scratch + i, _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(rows + i))));
  }
#endif
  for (; i < count * d; ++i) {
    scratch[i] = widened(rows[i]);
  }
  return scratch;
}

inline void decode(const Code8* row, int64_t d, float scale, float offset, float* out) {
  for (int64_t i = 0; i < d; ++i) {
    out[i] = static_cast<float>(row[i].byte) * scale + offset;
  }
}

inline void decode(const Code4* row, int64_t d, float scale, float offset, float* out) {
  for (int64_t i = 0; i + 1 < d; i += 2) {
    out[i] = static_cast<float>(row[i / 2].byte & 15) * scale + offset;
    out[i + 1] = static_cast<float>(row[i / 2].byte >> 4) * scale + offset;
  }
  if (d % 2) {
    out[d - 1] = static_cast<float>(row[d / 2].byte & 15) * scale + offset;
  }
}

template <typename Code>
inline const float* decoded_rows(const Code* rows, int64_t count, int64_t d, float* scratch) {
  for (int64_t i = 0; i < count; ++i) {
    const Code* row = row_at<Code>(rows, i, d);
    float range[2];
    std::memcpy(range, row + row_bytes<Code>(d) - kRangeBytes, sizeof(range));
    decode(row, d, range[0], range[1], scratch + i * d);
  }
  return scratch;
}

inline const float* as_float(const Code8* rows, int64_t count, int64_t d, float* scratch) {
  return decoded_rows(rows, count, d, scratch);
}

inline const float* as_float(const Code4* rows, int64_t count, int64_t d, float* scratch) {
  return decoded_rows(rows, count, d, scratch);
}

// call(a value of the type in which rows are stored).
template <typename Call>
auto with_type(Dtype dtype, const Call& call) {
  switch (dtype) {
    case Dtype::kFloat16:
      return call(Half());
    case Dtype::kBFloat16:
      return call(BFloat16());
    case Dtype::kCode8:
      return call(Code8());
    case Dtype::kCode4:
      return call(Code4());
    default:
      return call(float());
  }
}

} // namespace torch_ivf_module
