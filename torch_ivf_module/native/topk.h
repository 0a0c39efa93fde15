// The k best rows of each query so far.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <limits>
#include <vector>

namespace torch_ivf_module {

constexpr float kNever = -std::numeric_limits<float>::infinity();

// A score and a row as one integer that orders by score and, among equal scores, puts the first row first: comparing
// and selecting are integer operations.
inline uint64_t as_key(float score, uint32_t row) {
  uint32_t bits;
  std::memcpy(&bits, &score, sizeof(bits));
  bits ^= (bits >> 31) ? 0xffffffffu : 0x80000000u;
  return (static_cast<uint64_t>(bits) << 32) | (0xffffffffu - row);
}

inline float score_of(uint64_t key) {
  uint32_t bits = static_cast<uint32_t>(key >> 32);
  bits ^= (bits >> 31) ? 0x80000000u : 0xffffffffu;
  float score;
  std::memcpy(&score, &bits, sizeof(score));
  return score;
}

inline uint32_t row_of(uint64_t key) {
  return 0xffffffffu - static_cast<uint32_t>(key);
}

// Keeps, for each query of a block, at least its k best rows. New rows are appended; when the buffer of a query is full,
// all but the k best are dropped, and the worst of those becomes the query's threshold: rows that do not exceed it are
// neither stored nor examined.
class TopK {
 public:
  static constexpr bool kExact = false; // takes the scores of the scan
  // Entries of a query's buffer, 8 bytes each. More than k, so that many rows share one selection; not much more, because
  // there is no threshold before the first selection.
  static int64_t room(int64_t k) {
    return 2 * k + std::min<int64_t>(64, 8 * k);
  }

  TopK(int64_t queries, int64_t k)
      : k_(k),
        room_(room(k)),
        keys_(queries * room_),
        counts_(queries, 0),
        thresholds_(queries, kNever),
        uncertified_(queries, false) {}

  // Record that rows of the query may have been scored too low to be compared.
  void mark_uncertified(int64_t query) {
    uncertified_[query] = true;
  }

  float threshold(int64_t query) const {
    return thresholds_[query];
  }

  // Of a row whose score exceeds the threshold, as far as the caller knows.
  void take(int64_t query, float score, uint32_t row) {
    offer(query, score, row);
  }

  void offer(int64_t query, float score, uint32_t row) {
    if (!(score > thresholds_[query])) {
      return;
    }
    if (std::isinf(score)) { // a product that overflows says nothing about the row
      mark_uncertified(query);
      return;
    }
    uint64_t* keys = &keys_[query * room_];
    keys[counts_[query]++] = as_key(score, row);
    if (counts_[query] == room_) {
      shrink(query);
      thresholds_[query] = score_of(keys[k_ - 1]);
    }
  }

  // Merge the rows that another thread found for the same query.
  void merge(int64_t query, const TopK& other) {
    const uint64_t* keys = &other.keys_[query * room_];
    for (int32_t i = 0; i < other.counts_[query]; ++i) {
      offer(query, score_of(keys[i]), row_of(keys[i]));
    }
    uncertified_[query] = uncertified_[query] || other.uncertified_[query];
  }

  // Write the k best, best first, padded with kNever and -1. The last score is +inf for an uncertified query.
  void write(int64_t query, float* scores, int64_t* rows) {
    if (counts_[query] > k_) {
      shrink(query);
    }
    uint64_t* keys = &keys_[query * room_];
    const int64_t found = counts_[query];
    std::sort(keys, keys + found, std::greater<>());
    for (int64_t i = 0; i < k_; ++i) {
      scores[i] = i < found ? score_of(keys[i]) : kNever;
      rows[i] = i < found ? static_cast<int64_t>(row_of(keys[i])) : -1;
    }
    if (uncertified_[query]) {
      scores[k_ - 1] = -kNever;
    }
  }

 private:
  void shrink(int64_t query) {
    uint64_t* keys = &keys_[query * room_];
    std::nth_element(keys, keys + (k_ - 1), keys + counts_[query], std::greater<>());
    counts_[query] = static_cast<int32_t>(k_);
  }

  int64_t k_, room_;
  std::vector<uint64_t> keys_;
  std::vector<int32_t> counts_;
  std::vector<float> thresholds_;
  std::vector<uint8_t> uncertified_;
};

} // namespace torch_ivf_module
