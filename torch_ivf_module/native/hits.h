// All rows above a floor that each query brings.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

namespace torch_ivf_module {

class Hits {
 public:
  explicit Hits(const float* floors) : floors_(floors) {}

  float floor(int64_t query) const {
    return floors_[query];
  }

  void offer(int64_t query, float score, uint32_t row) {
    if (score > floors_[query]) {
      queries_.push_back(query);
      rows_.push_back(row);
    }
  }

  int64_t count() const {
    return static_cast<int64_t>(rows_.size());
  }

  void write(int64_t* queries, int64_t* rows) const {
    std::copy(queries_.begin(), queries_.end(), queries);
    std::copy(rows_.begin(), rows_.end(), rows);
  }

 private:
  const float* floors_;
  std::vector<int64_t> queries_, rows_;
};

} // namespace torch_ivf_module
