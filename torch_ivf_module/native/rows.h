// Rows as they are stored, numbers of 32 or 16 bits or codes, and their conversion to float32.
#pragma once

#include <cstdint>
#include <cstring>

#include "core.h"
#include "vec.h"

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

// Converts without denormal float32 numbers, which torch.set_flush_denormal would turn into zeros.
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

// The numbers of one row as float32: kLanes of them from place i on, or one.
template <typename T>
class RowReader;

template <>
class RowReader<float> {
 public:
  RowReader() = default;
  RowReader(const float* row, int64_t) : row_(row) {}

  Vec at(int64_t i) const {
    return Vec::loadu(row_ + i);
  }
  float number(int64_t i) const {
    return row_[i];
  }

 private:
  const float* row_ = nullptr;
};

template <>
class RowReader<BFloat16> {
 public:
  RowReader() = default;
  RowReader(const BFloat16* row, int64_t) : row_(row) {}

  Vec at(int64_t i) const {
    uint32_t bits[kLanes];
    for (int64_t j = 0; j < kLanes; ++j) {
      bits[j] = static_cast<uint32_t>(row_[i + j].bits) << 16;
    }
    Vec out;
    std::memcpy(&out.lanes, bits, sizeof(bits));
    return out;
  }
  float number(int64_t i) const {
    return widened(row_[i]);
  }

 private:
  const BFloat16* row_ = nullptr;
};

template <>
class RowReader<Half> {
 public:
  RowReader() = default;
  RowReader(const Half* row, int64_t) : row_(row) {}

  Vec at(int64_t i) const {
#if defined(__AVX512F__)
    return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(row_ + i)));
#elif defined(__F16C__)
    return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(row_ + i)));
#else
    float lanes[kLanes];
    for (int64_t j = 0; j < kLanes; ++j) {
      lanes[j] = widened(row_[i + j]);
    }
    return Vec::loadu(lanes);
#endif
  }
  float number(int64_t i) const {
    return widened(row_[i]);
  }

 private:
  const Half* row_ = nullptr;
};

// kLanes codes as numbers: bytes, or halves of bytes with the first in the low half.
#if defined(__AVX512F__)
inline Vec floats_of(__m128i bytes) {
  return _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(bytes));
}
#elif defined(__AVX2__)
inline Vec floats_of(__m128i bytes) {
  return _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(bytes));
}
#endif

inline Vec bytes_as_floats(const uint8_t* bytes) {
#if defined(__AVX2__) || defined(__AVX512F__)
  __m128i loaded = _mm_setzero_si128();
  std::memcpy(&loaded, bytes, kLanes);
  return floats_of(loaded);
#else
  float lanes[kLanes];
  for (int64_t j = 0; j < kLanes; ++j) {
    lanes[j] = bytes[j];
  }
  return Vec::loadu(lanes);
#endif
}

inline Vec halves_as_floats(const uint8_t* bytes) {
#if defined(__AVX2__) || defined(__AVX512F__)
  uint64_t loaded = 0;
  std::memcpy(&loaded, bytes, kLanes / 2);
  const __m128i all = _mm_cvtsi64_si128(static_cast<int64_t>(loaded)), low = _mm_set1_epi8(15);
  return floats_of(_mm_unpacklo_epi8(_mm_and_si128(all, low), _mm_and_si128(_mm_srli_epi16(all, 4), low)));
#else
  float lanes[kLanes];
  for (int64_t j = 0; j < kLanes; ++j) {
    lanes[j] = bytes[j / 2] >> (4 * (j % 2)) & 15;
  }
  return Vec::loadu(lanes);
#endif
}

// What rows of both kinds of codes share: the range of a row.
template <typename Code>
class CodedRow {
 public:
  CodedRow() = default;
  CodedRow(const Code* row, int64_t d) : row_(reinterpret_cast<const uint8_t*>(row)) {
    std::memcpy(&scale_, row_ + row_bytes<Code>(d) - kRangeBytes, sizeof(scale_));
    std::memcpy(&offset_, row_ + row_bytes<Code>(d) - sizeof(offset_), sizeof(offset_));
  }

 protected:
  // Rounded twice, as PyTorch decodes.
  Vec decoded(Vec codes) const {
    return codes.lanes * Vec(scale_).lanes + Vec(offset_).lanes;
  }
  float decoded(uint8_t code) const {
    return static_cast<float>(code) * scale_ + offset_;
  }

  const uint8_t* row_ = nullptr;

 private:
  float scale_ = 0, offset_ = 0;
};

template <>
class RowReader<Code8> : public CodedRow<Code8> {
 public:
  using CodedRow::CodedRow;

  Vec at(int64_t i) const {
    return decoded(bytes_as_floats(row_ + i));
  }
  float number(int64_t i) const {
    return decoded(row_[i]);
  }
};

template <>
class RowReader<Code4> : public CodedRow<Code4> {
 public:
  using CodedRow::CodedRow;

  Vec at(int64_t i) const {
    if (i % 2 == 0) {
      return decoded(halves_as_floats(row_ + i / 2));
    }
    float lanes[kLanes];
    for (int64_t j = 0; j < kLanes; ++j) {
      lanes[j] = number(i + j);
    }
    return Vec::loadu(lanes);
  }
  float number(int64_t i) const {
    return decoded(code(i));
  }

 private:
  uint8_t code(int64_t i) const {
    return row_[i / 2] >> (4 * (i % 2)) & 15;
  }
};

// Rows as float32 (count, d): where they lie, or converted into `scratch`.
inline const float* as_float(const float* rows, int64_t, int64_t, float*) {
  return rows;
}

template <typename T>
inline const float* as_float(const T* rows, int64_t count, int64_t d, float* scratch) {
  for (int64_t row = 0; row < count; ++row) {
    const RowReader<T> reader(row_at<T>(rows, row, d), d);
    float* out = scratch + row * d;
    int64_t i = 0;
    for (; i + kLanes <= d; i += kLanes) {
      reader.at(i).store(out + i);
    }
    for (; i < d; ++i) {
      out[i] = reader.number(i);
    }
  }
  return scratch;
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
