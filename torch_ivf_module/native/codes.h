// The layout of 8-bit codes, and the codes of a vector.
//
// A row v of a list with centre c is coded as r = v - c, about s i for a scale s > 0 of the row and integers i, |i| <= 127.
// The norm of what is lost, |r - s i|, is at most kappa s, with one kappa for the list. functional/codec.py has the same
// in PyTorch operations, and docs/codes.md the proof of the bounds.
//
// L lists, N vectors, d dim, P panels.
#pragma once

#include <cmath>

#include "core.h"
#include "dot.h"
#include "simd.h"

namespace torch_ivf_module {

constexpr int64_t kRun = 1 << 16; // rows of a list that are sorted together, numbered in 16 bits
constexpr float kUnit = 0x1p-24f; // of rounding
constexpr float kSmallestScale = 1e-14f;
// Limits of the norm of a coded vector: the square of the largest, divided by the smallest scale, is finite, and the square
// of the smallest does not underflow.
constexpr float kLargestNorm = 0x1p40f, kSmallestNorm = 1e-12f;

// A panel: scales and halves of squared norms, rounded up, of its rows; their numbers in the run; then, for each four
// dimensions, four codes, i + 128, of each row.
struct Panel {
  static constexpr int64_t kHead = kPanelHead;
  static constexpr int64_t kGroup = 4 * kCodedRows; // bytes of four dimensions

  const uint8_t* bytes;

  static int64_t groups(int64_t d) {
    return (d + 3) / 4;
  }

  const float* scales() const {
    return reinterpret_cast<const float*>(bytes);
  }
  const float* halves() const {
    return scales() + kCodedRows;
  }
  const uint16_t* rows() const {
    return reinterpret_cast<const uint16_t*>(halves() + kCodedRows);
  }
  const uint8_t* codes() const {
    return bytes + kHead;
  }
};

inline int64_t panels_of(int64_t rows) {
  return (rows + kCodedRows - 1) / kCodedRows;
}

// A bound of the relative error of a float32 sum of d squares, with a margin for values computed from the sum.
inline float sum_rounding(int64_t d) {
  return kUnit * static_cast<float>(d / 4 + 64);
}

// The residual x - centre, or x where centre is null, is written to `values`, with zeros up to a whole vector.
struct Residual {
  float most, squares; // the largest number, without its sign; the sum of squares
};

inline Residual residual(const float* x, const float* centre, int64_t d, float* values) {
  Vec most(0.0f), squares(0.0f);
  const auto take = [&](int64_t at, Vec value) {
    value.store(values + at);
    most = larger(most, absolute(value));
    squares = fmadd(value, value, squares);
  };
  int64_t i = 0;
  for (; i + kLanes <= d; i += kLanes) {
    take(i, centre ? Vec::loadu(x + i) - Vec::loadu(centre + i) : Vec::loadu(x + i));
  }
  if (i < d) {
    float last[kLanes] = {};
    for (int64_t j = i; j < d; ++j) {
      last[j - i] = centre ? x[j] - centre[j] : x[j];
    }
    take(i, Vec::loadu(last));
  }
  return {largest_of(most), sum_of(squares)};
}

// Integers i, up to whole vectors: `values` are about scale * i. inverse is 1 / scale.
struct Quantised {
  float squares; // of what is lost
  int32_t sum; // of the integers
};

inline Quantised quantise(const float* values, int64_t d, float scale, float inverse, int8_t* codes) {
  const Vec factor(inverse), step(-scale);
  Vec lost(0.0f);
  Ints total(0);
  for (int64_t i = 0; i < d; i += kLanes) {
    const Vec value = Vec::loadu(values + i);
    const Ints code = rounded(fmadd(value, factor, Vec(0.0f)));
    const Vec rest = fmadd(as_floats(code), step, value);
    lost = fmadd(rest, rest, lost);
    total.lanes += code.lanes;
    store_bytes(code, codes + i);
  }
  return {sum_of(lost), sum_of(total)};
}

inline float scale_of(float most, int levels) {
  return std::max(most / static_cast<float>(levels), kSmallestScale);
}

// The norm of a residual, and that of what is lost, rounded up.
inline float norm_of(float squares, int64_t d) {
  return std::sqrt(squares) * (1 + 2 * sum_rounding(d));
}

inline float error_of(float squares, float norm, float scale, int64_t d) {
  const float underflow = 0.01f * scale; // of squares
  return std::sqrt(squares) * (1 + 2 * sum_rounding(d)) + 2 * kUnit * norm + underflow;
}

} // namespace torch_ivf_module
