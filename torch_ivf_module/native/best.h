// The best rows of each query so far.
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

// A score and a row as one number that sorts as the score does and, among equal scores, puts the first row first:
// comparing and selecting are then those of integers.
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

// For each of some queries at least its k best rows. New ones are put behind the others, and when there is no more room
// all but the k best go. The worst of those is the query's floor: what does not exceed it is not stored, nor looked at.
class Best {
 public:
  // Room for more than k, 8 bytes each: a selection is shared by so many rows, but until the first there is no floor.
  static int64_t room(int64_t k) {
    return 2 * k + std::min<int64_t>(64, 8 * k);
  }

  void reset(int64_t queries, int64_t k) {
    k_ = k;
    room_ = room(k);
    keys_.resize(queries * room_);
    counts_.assign(queries, 0);
    floors_.assign(queries, kNever);
    spoiled_.assign(queries, false);
  }

  // Say that the query may have better rows than those offered, so that nothing is concluded from its scores.
  void spoil(int64_t query) {
    spoiled_[query] = true;
  }

  float floor(int64_t query) const {
    return floors_[query];
  }

  void offer(int64_t query, float score, uint32_t row) {
    if (!(score > floors_[query]) || std::isinf(score)) {
      return;
    }
    uint64_t* keys = &keys_[query * room_];
    keys[counts_[query]++] = as_key(score, row);
    if (counts_[query] == room_) {
      shrink(query);
      floors_[query] = score_of(keys[k_ - 1]);
    }
  }

  // Take over what was found for the same query elsewhere.
  void take(int64_t query, const Best& other) {
    const uint64_t* keys = &other.keys_[query * room_];
    for (int32_t i = 0; i < other.counts_[query]; ++i) {
      offer(query, score_of(keys[i]), row_of(keys[i]));
    }
    spoiled_[query] = spoiled_[query] || other.spoiled_[query];
  }

  // The k best, best first, padded with kNever and -1. The last score is infinite for a query that was spoiled.
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
    if (spoiled_[query]) {
      scores[k_ - 1] = -kNever;
    }
  }

 private:
  void shrink(int64_t query) {
    uint64_t* keys = &keys_[query * room_];
    std::nth_element(keys, keys + (k_ - 1), keys + counts_[query], std::greater<>());
    counts_[query] = static_cast<int32_t>(k_);
  }

  int64_t k_ = 0;
  int64_t room_ = 0;
  std::vector<uint64_t> keys_;
  std::vector<int32_t> counts_;
  std::vector<float> floors_;
  std::vector<uint8_t> spoiled_;
};

} // namespace torch_ivf_module
