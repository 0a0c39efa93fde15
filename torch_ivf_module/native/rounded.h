// Vectors rounded to fewer bits, and what that can change.
//
// d dim; d2 is d made even, for products are taken two places at a time.
#pragma once

#include <ATen/native/CPUBlas.h>
#include <c10/util/BFloat16.h>

#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

#include "offer.h"

namespace torch_ivf_module {

// A vector's length and how far rounding moved it, neither of them too small.
struct Sizes {
  float length, moved;
};

// A norm that is certainly no smaller than that of d squares summed up in float32: each addition may lose half a unit,
// and squares below the smallest normal number may vanish.
inline float norm_above(float squares, int64_t d) {
  const float unit = 1.2e-7f;
  return std::sqrt(squares) * (1.0f + static_cast<float>(d + 16) * unit) + std::sqrt(static_cast<float>(d)) * 0x1p-62f;
}

inline float sum_of_squares(const float* values, int64_t d) {
  Vec sum(0.0f);
  int64_t i = 0;
  for (; i + kLanes <= d; i += kLanes) {
    const Vec value = Vec::loadu(values + i);
    sum = at::vec::fmadd(value, value, sum);
  }
  float total = sum_of(sum);
  for (; i < d; ++i) {
    total += values[i] * values[i];
  }
  return total;
}

inline float largest_of(const float* values, int64_t d) {
  Vec most(0.0f);
  int64_t i = 0;
  for (; i + kLanes <= d; i += kLanes) {
    most = at::vec::maximum(most, Vec::loadu(values + i).abs());
  }
  float largest = at::vec::vec_reduce_all<float>(
      [](const Vec& a, const Vec& b) { return at::vec::maximum(a, b); }, most);
  for (; i < d; ++i) {
    largest = std::max(largest, std::abs(values[i]));
  }
  return largest;
}

// Whole numbers of at most 16 bits times a scale of each vector. Products are exact: 32 bits hold their sums.
struct Fixed {
  using Value = int16_t;
  // Queries of a product: fewer than in float32, for each sum needs a register more for what is added to it.
  static constexpr int kGroup = kQueries * 2 / 3;
  static constexpr int64_t kTile = kPanel; // rows of a product

  explicit Fixed(int64_t d2)
      : most_(std::min(32767.0f, std::floor(std::sqrt(2147483647.0f / static_cast<float>(d2 + 1))))) {}

  // Round `from` to `to`, put what `to` stands for into `back`, and return the scale.
  float round(const float* from, int64_t d, int16_t* to, float* back) const {
    const float largest = largest_of(from, d);
    const float scale = std::max(largest / most_, 0x1p-100f);
    const float inverse = 1.0f / scale;
    for (int64_t i = 0; i < d; ++i) {
      const float whole = (from[i] * inverse + 0x1.8p23f) - 0x1.8p23f; // to the nearest, as vectors are
      to[i] = static_cast<int16_t>(static_cast<int32_t>(whole == whole ? whole : 0.0f));
      back[i] = whole * scale;
    }
    return scale;
  }

  // Whether two values of a row lie side by side in a tile.
  bool paired() const {
    return true;
  }

  // each(m, column, low, high) for the products of `count` queries (count, d2) with a tile.
  template <typename Each>
  void product(int count, const int16_t* queries, const int16_t* tile, int64_t d2, const Each& each) {
    with_count<kGroup>(count, [&](auto m) { product_of<m>(queries, tile, d2, each); });
  }

 private:
#if defined(CPU_CAPABILITY_AVX512)
  using Whole = __m512i;
  static Whole zero() { return _mm512_setzero_si512(); }
  static Whole load(const int16_t* at) { return _mm512_loadu_si512(at); }
  static Whole pair_of(const int16_t* at) { return _mm512_set1_epi32(bits_of(at)); }
  static Whole add_products(Whole sum, Whole a, Whole b) { return _mm512_add_epi32(sum, _mm512_madd_epi16(a, b)); }
  static Vec as_float(Whole sum) { return _mm512_cvtepi32_ps(sum); }
#elif defined(CPU_CAPABILITY_AVX2)
  using Whole = __m256i;
  static Whole zero() { return _mm256_setzero_si256(); }
  static Whole load(const int16_t* at) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(at)); }
  static Whole pair_of(const int16_t* at) { return _mm256_set1_epi32(bits_of(at)); }
  static Whole add_products(Whole sum, Whole a, Whole b) { return _mm256_add_epi32(sum, _mm256_madd_epi16(a, b)); }
  static Vec as_float(Whole sum) { return _mm256_cvtepi32_ps(sum); }
#else
  struct Whole { int32_t at[kLanes]; };
  static Whole zero() { return {}; }
  static Whole load(const int16_t* at) {
    Whole out;
    std::memcpy(out.at, at, sizeof(out.at));
    return out;
  }
  static Whole pair_of(const int16_t* at) {
    Whole out;
    std::fill(out.at, out.at + kLanes, bits_of(at));
    return out;
  }
  static Whole add_products(Whole sum, Whole a, Whole b) {
    for (int64_t i = 0; i < kLanes; ++i) {
      const int32_t first = static_cast<int16_t>(a.at[i]) * static_cast<int16_t>(b.at[i]);
      sum.at[i] += first + (a.at[i] >> 16) * (b.at[i] >> 16);
    }
    return sum;
  }
  static Vec as_float(const Whole& sum) {
    float out[kLanes];
    std::copy(sum.at, sum.at + kLanes, out);
    return Vec::loadu(out);
  }
#endif

  static int32_t bits_of(const int16_t* at) {
    int32_t bits;
    std::memcpy(&bits, at, sizeof(bits));
    return bits;
  }

  template <int M, typename Each>
  static void product_of(const int16_t* queries, const int16_t* tile, int64_t d2, const Each& each) {
    Whole sum[M][2];
    UNROLLED for (int m = 0; m < M; ++m) {
      sum[m][0] = zero();
      sum[m][1] = zero();
    }
    for (int64_t i = 0; i < d2; i += 2) {
      const Whole low = load(tile + i * kTile);
      const Whole high = load(tile + i * kTile + 2 * kLanes);
      UNROLLED for (int m = 0; m < M; ++m) {
        const Whole pair = pair_of(queries + m * d2 + i);
        sum[m][0] = add_products(sum[m][0], pair, low);
        sum[m][1] = add_products(sum[m][1], pair, high);
      }
    }
    UNROLLED for (int m = 0; m < M; ++m) {
      each(m, 0, as_float(sum[m][0]), as_float(sum[m][1]));
    }
  }

  float most_;
};

// bfloat16, multiplied by torch's own block products: by AMX or AVX-512 where the CPU has units for it.
struct Brain {
  using Value = at::BFloat16;
  // One shape of product for all lists: a kernel is generated for each.
  static constexpr int kGroup = 32;
  static constexpr int64_t kTile = 64;

  explicit Brain(int64_t) : paired_(at::native::cpublas::could_pack(at::kBFloat16)), products_(kGroup * kTile) {}
  Brain(Brain&& other) = default;

  ~Brain() {
    if (!products_.empty()) {
      at::native::cpublas::brgemm_release(paired_);
    }
  }

  float round(const float* from, int64_t d, at::BFloat16* to, float* back) const {
    for (int64_t i = 0; i < d; ++i) {
      to[i] = from[i];
      back[i] = to[i];
    }
    return 1.0f;
  }

  bool paired() const {
    return paired_;
  }

  template <typename Each>
  void product(int count, const at::BFloat16* queries, const at::BFloat16* tile, int64_t d2, const Each& each) {
    float* products = products_.data();
    at::native::cpublas::brgemm(
        kGroup, kTile, d2, d2, kTile, kTile, /*add_C=*/false, queries, tile, products, paired_);
    for (int m = 0; m < count; ++m) {
      for (int64_t column = 0; column < kTile; column += kPanel) {
        const float* at = products + m * kTile + column;
        each(m, column, Vec::loadu(at), Vec::loadu(at + kLanes));
      }
    }
  }

 private:
  bool paired_;
  std::vector<float> products_;
};

} // namespace torch_ivf_module
