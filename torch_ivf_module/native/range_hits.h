// All rows above a threshold that each query brings, for range search.
#pragma once

#include <cstdint>
#include <vector>

#include "topk.h"

namespace torch_ivf_module {

struct Hit {
  int64_t query, row;
};

class RangeHits {
 public:
  static constexpr bool kExact = false;

  explicit RangeHits(const float* thresholds) : thresholds_(thresholds) {}

  float threshold(int64_t query) const {
    return thresholds_[query];
  }

  void note(int64_t, Rounding) {}

  void take(int64_t query, float, uint32_t row) {
    hits_.push_back({query, static_cast<int64_t>(row)});
  }

  void offer(int64_t query, float score, uint32_t row) {
    if (score > thresholds_[query]) {
      take(query, score, row);
    }
  }

  const std::vector<Hit>& hits() const {
    return hits_;
  }

 private:
  const float* thresholds_;
  std::vector<Hit> hits_;
};

} // namespace torch_ivf_module
