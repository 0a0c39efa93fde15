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

#include "simd.h"

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

inline float product_of(const float* x, const float* y, int64_t d) {
  Vec sum(0.0f);
  int64_t i = 0;
  for (; i + kLanes <= d; i += kLanes) {
    sum = at::vec::fmadd(Vec::loadu(x + i), Vec::loadu(y + i), sum);
  }
  float total = sum_of(sum);
  for (; i < d; ++i) {
    total += x[i] * y[i];
  }
  return total;
}

// Products of bfloat16 tiles by torch's own block products, which use AMX where the CPU has it.
class TileProducts {
 public:
  // One shape for all lists: torch generates a kernel for each.
  static constexpr int kGroup = 32; // queries
  static constexpr int64_t kTile = 64; // rows

  TileProducts() : paired_(at::native::cpublas::could_pack(at::kBFloat16)), products_(kGroup * kTile) {}
  TileProducts(TileProducts&& other) = default;

  ~TileProducts() {
    if (!products_.empty()) {
      at::native::cpublas::brgemm_release(paired_);
    }
  }

  // Whether two values of a row lie side by side in a tile.
  bool paired() const {
    return paired_;
  }

  // each(m, column, low, high) for the products of `count` queries (kGroup, d2) with a tile.
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
