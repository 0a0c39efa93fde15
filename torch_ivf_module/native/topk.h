// The k best rows of each query so far.
#pragma once

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <limits>
#include <memory>
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

// What a score must exceed to count, for each query of a block. The threads that scan for these queries share it, so that
// what one of them has found spares the others work.
class Thresholds {
 public:
  explicit Thresholds(int64_t queries) : values_(queries) {
    for (std::atomic<float>& value : values_) {
      value.store(kNever, std::memory_order_relaxed);
    }
  }

  float of(int64_t query) const {
    return values_[query].load(std::memory_order_relaxed);
  }

  // Let no score below `score` count any more. Equal ones do: which of them are kept is decided by their rows, so that it
  // does not depend on the order in which they are found.
  void raise(int64_t query, float score) {
    const float below = std::nextafter(score, kNever);
    float known = of(query);
    while (known < below && !values_[query].compare_exchange_weak(known, below, std::memory_order_relaxed)) {
    }
  }

 private:
  std::vector<std::atomic<float>> values_;
};

// How a ranking score was computed, which determines the bound of its rounding error. The values are bits.
enum Rounding : uint8_t { kByDifferences = 1, kAlongRows = 2, kByPanels = 4 };

// Keeps, for each query of a block, at least its k best rows of those that one thread has found. New rows are appended;
// when the buffer of a query is full, all but the k best are dropped, and the worst of those raises the query's
// threshold: rows that do not exceed it are neither stored nor examined.
class TopK {
 public:
  static constexpr bool kExact = false; // takes the scores of the scan
  // Entries of a query's buffer, 8 bytes each. More than k, so that many rows share one selection; not much more, because
  // there is no threshold before the first selection.
  static int64_t room(int64_t k) {
    return 2 * k + std::min<int64_t>(64, 8 * k);
  }
  static int64_t bytes(int64_t k) {
    return 8 * room(k);
  }

  TopK(int64_t queries, int64_t k, Thresholds& thresholds)
      : k_(k), room_(room(k)), keys_(new uint64_t[queries * room_]), states_(queries), thresholds_(thresholds) {}

  float threshold(int64_t query) const {
    return thresholds_.of(query);
  }

  // Record how some rows of the query are scored.
  void note(int64_t query, Rounding rounding) {
    states_[query].roundings |= rounding;
  }

  // Take a row. Its score exceeded the threshold when the caller last read it.
  void take(int64_t query, float score, uint32_t row) {
    offer(query, score, row);
  }

  void offer(int64_t query, float score, uint32_t row) {
    if (!(score > threshold(query))) {
      return;
    }
    State& state = states_[query];
    if (std::isinf(score)) { // a product that overflows says nothing about the row
      state.uncertified = true;
      return;
    }
    const uint64_t key = as_key(score, row);
    if (key <= state.worst) {
      return;
    }
    uint64_t* keys = &keys_[query * room_];
    keys[state.count++] = key;
    if (state.count == room_) {
      shrink(query);
    }
  }

  // Merge the rows that another thread found for the same query.
  void merge(int64_t query, const TopK& other) {
    const State& theirs = other.states_[query];
    const uint64_t* keys = &other.keys_[query * room_];
    for (int64_t i = 0; i < theirs.count; ++i) {
      offer(query, score_of(keys[i]), row_of(keys[i]));
    }
    states_[query].uncertified |= theirs.uncertified;
    states_[query].roundings |= theirs.roundings;
  }

  // The keys of the k best in any order, and what no other row's score exceeds: kNever if there are no others, +inf for an
  // uncertified query.
  struct Best {
    const uint64_t* keys;
    int64_t count;
    float others;
    uint8_t roundings; // of all scores
  };

  Best best(int64_t query, std::vector<uint64_t>&) {
    const State& state = states_[query];
    if (state.count > k_) {
      shrink(query);
    }
    const uint64_t* keys = &keys_[query * room_];
    const bool full = state.count == k_;
    const uint64_t last = !full ? 0 : state.worst ? state.worst : *std::min_element(keys, keys + k_);
    return {keys, state.count, state.uncertified ? -kNever : full ? score_of(last) : kNever,
            state.roundings};
  }

  // Write the k best, best first, padded with kNever and -1. The last score is +inf for an uncertified query.
  void write(int64_t query, float* scores, int64_t* rows) {
    State& state = states_[query];
    uint64_t* keys = &keys_[query * room_];
    const int64_t found = std::min(state.count, k_);
    std::partial_sort(keys, keys + found, keys + state.count, std::greater<>());
    for (int64_t i = 0; i < k_; ++i) {
      scores[i] = i < found ? score_of(keys[i]) : kNever;
      rows[i] = i < found ? static_cast<int64_t>(row_of(keys[i])) : -1;
    }
    if (state.uncertified) {
      scores[k_ - 1] = -kNever;
    }
  }

 private:
  struct State {
    uint64_t worst = 0; // key that a further row must exceed
    int64_t count = 0;
    uint8_t roundings = 0;
    bool uncertified = false; // rows may have been scored too low to be compared
  };

  void shrink(int64_t query) {
    State& state = states_[query];
    uint64_t* keys = &keys_[query * room_];
    std::nth_element(keys, keys + (k_ - 1), keys + state.count, std::greater<>());
    state.count = k_;
    state.worst = keys[k_ - 1];
    thresholds_.raise(query, score_of(state.worst));
  }

  int64_t k_, room_;
  std::unique_ptr<uint64_t[]> keys_;
  std::vector<State> states_;
  Thresholds& thresholds_;
};

} // namespace torch_ivf_module
