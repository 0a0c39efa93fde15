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

// The bounds for one query and one list. With the integer product `dot` of the codes, started at `start`, the scale s and
// half of the squared norm h of a row, no exact score of it exceeds scale * (dot * s + h * slope) + base, nor is it below
// that less (width_scale * s + width_half * h + width).
struct QueryBounds {
  int32_t start;
  float scale, inverse, slope, base;
  float width_scale, width_half, width;
  float lowest_norm, highest_norm; // of rows that can reach the threshold for which this was made

  // False where nothing can be said of the query.
  bool set(
      const Coded& query, const float* x, const float* centre, const float* limits, int64_t d, bool differences,
      float threshold) {
    const float kappa = limits[0], norm = query.norm, error = query.error;
    const float most = norm + error; // of the coded query's norm
    const float steps = std::ceil(kappa * most * query.inverse * (1 + 16 * kUnit));
    if (!query.bounded(kSmallestNorm) || !(steps < 0x1p29f) || !(limits[2] < kLargestNorm)) {
      return false;
    }
    const float g = std::max(limits[1], 2 * error), over_g = 1 / g;
    const float e = 8 * sum_rounding(d) + static_cast<float>(row_rounding(d));
    float slack = norm * g, slack_half = 2 * norm * over_g, centre_score;
    if (differences) {
      centre_score = -0.5f * norm * norm;
      slack += norm * norm;
      slack_half += 2;
    } else {
      centre_score = exact_score<false>(x, centre, d);
      slack += 2 * norm * limits[2];
    }
    slack = e * slack + 1e-30f;
    slack_half *= e;
    start = static_cast<int32_t>(steps) - 128 * static_cast<int32_t>(query.sum);
    scale = query.scale;
    inverse = query.inverse;
    slope = (error * over_g + slack_half - (differences ? 1.0f : 0.0f)) * inverse;
    base = centre_score + error * g * 0.5f + slack;
    width_scale = 2 * scale * steps;
    width_half = 2 * (error * over_g + slack_half);
    width = error * g + 2 * slack;
    set_norms(norm, centre_score + slack, threshold, differences, 2 * e);
    return true;
  }

  // What dot * s + h * slope must exceed for a score above the threshold.
  float needed(float threshold) const {
    return (threshold - base) * inverse;
  }

 private:
  // By the triangle inequality where scores are half of negated squared distances, by Cauchy's where they are products.
  void set_norms(float norm, float centre_score, float threshold, bool differences, float rounding) {
    lowest_norm = 0;
    highest_norm = std::numeric_limits<float>::infinity();
    if (threshold == kNever) {
      return;
    }
    if (differences) {
      const float reach = std::sqrt(std::max(0.0f, -2 * threshold)) * (1 + rounding);
      lowest_norm = norm * (1 - rounding) - reach;
      highest_norm = norm * (1 + rounding) + reach;
    } else if (norm > 0) {
      const float more = threshold - centre_score; // what the residual must add
      lowest_norm = more / norm - rounding * (std::fabs(threshold) + std::fabs(centre_score)) / norm;
    }
  }
};

} // namespace torch_ivf_module
