// Bounds of the exact score of a coded row, which follow from the codes of a query and of the row.
//
// For a = x - c, or a = x where scores are products, and r = v - c: |<a, r> - <a', r'>| <= |a - a'| |r| + |a'| |r - r'|
// for the coded a' and r'. Of these, |r - r'| <= kappa times the scale of the row, and |r| <= g / 2 + |r|^2 / 2g for every
// g > 0. So the bound is linear in what a panel holds of a row, its scale and half of its squared norm. docs/codes.md has
// the proof, with the rounding of float32.
#pragma once

#include "certify.h"
#include "codes.h"

namespace torch_ivf_module {

// Scores here are those of which exact scores are a multiple: half of it where that is the negated squared distance.
inline float half_score(bool differences, float exact) {
  return differences ? exact * 0.5f : exact;
}

// The bounds for some queries and one list. With the integer product `dot` of the codes, started at `start`, the scale s and
// half of the squared norm h of a row, no exact score of it exceeds scale * (dot * s + h * slope) + base, nor is it below
// that less (width_scale * s + width_half * h + width). Computed for all queries at once, in vectors.
struct QueryBounds {
  static constexpr int kSlots = 16;
  static_assert(kQueries <= kSlots);

  // Set before.
  alignas(64) float most[kSlots] = {}, squares[kSlots] = {}; // see Residual
  float lost[kSlots] = {}, centre_score[kSlots] = {}; // squares, see Quantised; of products with the centre
  int32_t sum[kSlots] = {};
  float threshold[kSlots] = {};

  alignas(64) float scale[kSlots], inverse[kSlots];
  int32_t start[kSlots];
  float slope[kSlots], base[kSlots], needed[kSlots]; // what dot * s + h * slope must exceed for a score above the threshold
  float width_scale[kSlots], width_half[kSlots], width[kSlots];
  float lowest_norm[kSlots], highest_norm[kSlots]; // of rows that can reach the threshold
  int32_t bounded[kSlots]; // 0 where nothing can be said of the query: no row exceeds what it needs

  void set_scales(int levels) {
    for (int m = 0; m < kSlots; ++m) {
      scale[m] = scale_of(most[m], levels);
      inverse[m] = 1 / scale[m];
    }
  }

  // `limits` are those of the list, see Codes.
  void set(const float* limits, int64_t d, bool differences) {
    const float e = 8 * sum_rounding(d) + static_cast<float>(row_rounding(d));
    const float kappa = limits[0], typical = limits[1], centre_norm = limits[2];
    const bool coded = kappa < kLargestNorm && centre_norm < kLargestNorm; // not NaN
    const float square = differences ? 1.0f : 0.0f;
    for (int m = 0; m < kSlots; ++m) {
      const float size = norm_of(squares[m], d), error = error_of(lost[m], size, scale[m], d);
      const float steps = std::ceil(kappa * (size + error) * inverse[m] * (1 + 16 * kUnit));
      const float g = std::max(typical, 2 * error), over_g = 1 / g;
      const float centre = differences ? -0.5f * size * size : centre_score[m];
      const float slack = e * (size * g + square * size * size + 2 * (1 - square) * size * centre_norm) + 1e-30f;
      const float slack_half = e * (2 * size * over_g + 2 * square);
      const bool known = coded && size < kLargestNorm && (size == 0.0f || size >= kSmallestNorm) && steps < 0x1p29f;
      bounded[m] = known;
      start[m] = (known ? static_cast<int32_t>(steps) : 0) - 128 * sum[m];
      slope[m] = (error * over_g + slack_half - square) * inverse[m];
      base[m] = centre + error * g * 0.5f + slack;
      needed[m] = known ? (threshold[m] - base[m]) * inverse[m] : std::numeric_limits<float>::infinity();
      width_scale[m] = 2 * scale[m] * steps;
      width_half[m] = 2 * (error * over_g + slack_half);
      width[m] = error * g + 2 * slack;
      // By the triangle inequality where scores are half of negated squared distances, by Cauchy's where they are products.
      const float far = std::numeric_limits<float>::infinity();
      const float reach = std::sqrt(std::max(0.0f, -2 * threshold[m])) * (1 + 2 * e);
      const float more = threshold[m] - centre - slack - 2 * e * (std::fabs(threshold[m]) + std::fabs(centre));
      lowest_norm[m] = !known ? far : differences ? size * (1 - 2 * e) - reach : size > 0 ? more / size : 0;
      highest_norm[m] = !known ? -far : differences ? size * (1 + 2 * e) + reach : far;
    }
  }

  void raise(int m, float above) {
    needed[m] = (above - base[m]) * inverse[m];
  }
};

} // namespace torch_ivf_module
