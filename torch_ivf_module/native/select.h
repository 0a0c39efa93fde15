// Selection of the largest of many numbers by bisection: a step compares all of them, a vector at a time.
#pragma once

#include <cmath>

#include "dot.h"
#include "topk.h"

namespace torch_ivf_module {

inline int64_t whole_vectors(int64_t count) {
  return (count + kLanes - 1) / kLanes * kLanes;
}

// A number that at least k of `count` values exceed, and few more than k; -inf where some values are infinite. `values` has
// room for whole vectors; what lies behind the last value is overwritten.
inline float below_largest(float* values, int64_t count, int64_t k) {
  constexpr int kSteps = 10;
  float* const end = values + whole_vectors(count);
  std::fill(values + count, end, values[0]);
  Vec most = Vec::loadu(values), least = most;
  for (const float* at = values; at < end; at += kLanes) {
    most = larger(most, Vec::loadu(at));
    least = smaller(least, Vec::loadu(at));
  }
  std::fill(values + count, end, kNever);
  float below = std::nextafter(least_of(least), kNever), above = largest_of(most);
  for (int step = 0; step < kSteps; ++step) {
    const float middle = below + (above - below) * 0.5f;
    if (!(middle > below && middle < above)) {
      break;
    }
    int64_t exceed = 0;
    for (const float* at = values; at < end; at += kLanes) {
      exceed += __builtin_popcount(exceeding(Vec::loadu(at), Vec(middle)));
    }
    (exceed >= k ? below : above) = middle;
    if (exceed == k) {
      break;
    }
  }
  return below;
}

// Keeps, for each query of a block, the scores of all rows of one list that is not long: then selecting the k best once
// takes less time than comparing each row with those so far. As TopK, otherwise.
class AllScores {
 public:
  static constexpr bool kExact = false;
  static constexpr int64_t kMostRows = 4096;

  static int64_t bytes(int64_t rows) {
    return 4 * whole_vectors(rows);
  }

  AllScores(int64_t queries, int64_t rows, int64_t k)
      : rows_(rows), k_(k), scores_(queries * whole_vectors(rows), kNever), roundings_(queries) {}

  float threshold(int64_t) const {
    return kNever;
  }

  void note(int64_t query, Rounding rounding) {
    roundings_[query] |= rounding;
  }

  void take(int64_t query, float score, uint32_t row) {
    of(query)[row] = score;
  }

  void offer(int64_t query, float score, uint32_t row) {
    take(query, score, row);
  }

  void merge(int64_t query, const AllScores& other) {
    const float* theirs = const_cast<AllScores&>(other).of(query);
    for (int64_t row = 0; row < rows_; ++row) {
      of(query)[row] = std::max(of(query)[row], theirs[row]);
    }
    roundings_[query] |= other.roundings_[query];
  }

  // The keys are written to `keys`.
  TopK::Best best(int64_t query, std::vector<uint64_t>& keys) {
    float* scores = of(query);
    keys.clear();
    const bool overflows = std::count(scores, scores + rows_, -kNever);
    if (overflows) { // which says nothing about a row: it must not take the place of another
      std::replace(scores, scores + rows_, -kNever, kNever);
    }
    const float below = k_ < rows_ ? below_largest(scores, rows_, k_) : kNever;
    for (int64_t row = 0; row < rows_; row += kLanes) {
      for (unsigned which = exceeding(Vec::loadu(scores + row), Vec(below)); which; which &= which - 1) {
        const int64_t i = row + __builtin_ctz(which);
        keys.push_back(as_key(scores[i], static_cast<uint32_t>(i)));
      }
    }
    const bool full = static_cast<int64_t>(keys.size()) >= k_;
    if (full) {
      std::nth_element(keys.begin(), keys.begin() + (k_ - 1), keys.end(), std::greater<>());
    }
    const int64_t count = full ? k_ : static_cast<int64_t>(keys.size());
    return {keys.data(), count, overflows ? -kNever : full ? score_of(keys[k_ - 1]) : kNever, roundings_[query]};
  }

 private:
  float* of(int64_t query) {
    return &scores_[query * whole_vectors(rows_)];
  }

  int64_t rows_, k_;
  std::vector<float> scores_; // (queries, rows), kNever where none was taken
  std::vector<uint8_t> roundings_;
};

} // namespace torch_ivf_module
