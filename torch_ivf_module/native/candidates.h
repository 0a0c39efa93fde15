// Rows that may be among the k best of a query, with bounds of their scores.
//
// Q queries, d dim, k results.
#pragma once

#include <algorithm>
#include <cmath>
#include <functional>
#include <memory>
#include <vector>

#include "bounds.h"
#include "select.h"

namespace torch_ivf_module {

// Exact scores of the rows of a problem.
class RowScorer {
 public:
  RowScorer(const Problem& p, bool differences) : p_(p), differences_(differences) {}

  // `scratch` is (d,).
  float operator()(const float* x, int64_t row, float* scratch) const {
    return with_type(p_.dtype, [&](auto type) {
      const float* vector = as_float(p_.row<decltype(type)>(row), 1, p_.d, scratch);
      return exact_score(differences_, x, vector, p_.d);
    });
  }

  void prefetch(int64_t row) const {
    const char* from = p_.row<char>(row);
    for (int64_t i = 0; i < p_.row_bytes; i += 64) {
      __builtin_prefetch(from + i, 0, 2);
    }
  }

  bool differences() const {
    return differences_;
  }

 private:
  const Problem& p_;
  bool differences_;
};

namespace {

// Scratch memory of one thread. Threads may score different queries of the same block at the same time.
struct ScoreBuffers {
  std::vector<float> row;
  std::vector<uint64_t> order, keys;
};

thread_local ScoreBuffers score_buffers;

} // namespace

// Keeps, for each query of a block, every row that one thread has found and that may be a result: its optimistic bound
// exceeds the query's threshold. At least k rows have pessimistic bounds above the threshold. If too many rows remain,
// all of them are scored exactly and the k best are kept, so the memory of a query is limited for any data.
class Candidates {
 public:
  // Entries of a query, kBytes each.
  static constexpr int64_t kBytes = 12;
  static int64_t room(int64_t k) {
    return whole_vectors(4 * k + 160);
  }

  Candidates(
      int64_t queries,
      int64_t d,
      int64_t k,
      const float* x, // (queries, d)
      const RowScorer& scorer,
      Thresholds& thresholds)
      : d_(d),
        k_(k),
        room_(room(k)),
        x_(x),
        scorer_(scorer),
        thresholds_(thresholds),
        bounds_(new float[2 * queries * room_]),
        rows_(new uint32_t[queries * room_]),
        states_(queries, State{0, std::min(room_ - 2 * kLanes, std::max<int64_t>(64, 2 * k)), 0}) {}

  int64_t queries() const {
    return static_cast<int64_t>(states_.size());
  }

  float threshold(int64_t query) const {
    return thresholds_.of(query);
  }

  // Take the rows of kLanes whose bit is set.
  void take(int64_t query, Vec high, Vec low, const uint32_t* rows, unsigned which) {
    State& state = states_[query];
    float values[kLanes];
    high.store(values);
    store_some(values, which, highs(query) + state.count);
    low.store(values);
    store_some(values, which, lows(query) + state.count);
    store_some(rows, which, rows_of(query) + state.count);
    state.count += __builtin_popcount(which);
    if (state.count >= state.next) {
      prune(query);
    }
  }

  // Take a row by its exact score.
  void score(int64_t query, uint32_t row) {
    const float exact = half_score(scorer_.differences(), exact_score_of(query, row));
    ++states_[query].scored;
    take_one(query, exact, exact, row);
  }

  void merge(int64_t query, const Candidates& other) {
    const int64_t count = other.states_[query].count;
    for (int64_t i = 0; i < count; ++i) {
      take_one(query, other.highs(query)[i], other.lows(query)[i], other.rows_of(query)[i]);
    }
    states_[query].scored += other.states_[query].scored;
  }

  // Request the rows that `write` will score.
  void prefetch(int64_t query) {
    prune(query);
    for (int64_t i = 0; i < states_[query].count; ++i) {
      scorer_.prefetch(rows_of(query)[i]);
    }
  }

  // Write the k best by exact score, best first, padded with kNever and -1. Returns how many rows were scored exactly.
  int64_t write(int64_t query, float* scores, int64_t* rows) {
    prune(query);
    const std::vector<uint64_t>& keys = score_all(query);
    for (int64_t i = 0; i < k_; ++i) {
      const bool found = i < static_cast<int64_t>(keys.size());
      scores[i] = found ? score_of(keys[i]) : kNever;
      rows[i] = found ? static_cast<int64_t>(row_of(keys[i])) : -1;
    }
    return states_[query].scored;
  }

 private:
  struct State {
    int64_t count; // of entries
    int64_t next; // count from which on to drop some
    int64_t scored; // rows
  };

  float* highs(int64_t query) const {
    return &bounds_[2 * query * room_];
  }
  float* lows(int64_t query) const {
    return highs(query) + room_;
  }
  uint32_t* rows_of(int64_t query) const {
    return &rows_[query * room_];
  }

  float exact_score_of(int64_t query, int64_t row) {
    return scorer_(x_ + query * d_, row, torch_ivf_module::take(score_buffers.row, d_));
  }

  void take_one(int64_t query, float high, float low, uint32_t row) {
    if (!(high > threshold(query)) || std::isinf(high)) {
      return;
    }
    State& state = states_[query];
    highs(query)[state.count] = high;
    lows(query)[state.count] = low;
    rows_of(query)[state.count] = row;
    if (++state.count >= state.next) {
      prune(query);
    }
  }

  // Drop the entries that the threshold rules out, after having raised it.
  void prune(int64_t query) {
    State& state = states_[query];
    if (state.count > k_) {
      raise(query);
    }
    const Vec threshold(this->threshold(query));
    float *high = highs(query), *low = lows(query);
    uint32_t* rows = rows_of(query);
    int64_t kept = 0;
    for (int64_t i = 0; i < state.count; i += kLanes) {
      unsigned which = exceeding(Vec::loadu(high + i), threshold);
      which &= state.count - i < kLanes ? (1u << (state.count - i)) - 1 : ~0u;
      store_some(high + i, which, high + kept);
      store_some(low + i, which, low + kept);
      store_some(rows + i, which, rows + kept);
      kept += __builtin_popcount(which);
    }
    state.count = kept;
    state.next = std::min(room_ - 2 * kLanes, kept + std::max<int64_t>(32, k_));
    if (kept > room_ - 4 * kLanes && kept > k_) {
      keep_best(query);
    }
  }

  // Raise the threshold to a value that at least k pessimistic bounds exceed, near the k-th best of them.
  void raise(int64_t query) {
    thresholds_.raise(query, below_largest(lows(query), states_[query].count, k_));
  }

  // Score all entries exactly, and keep the k best.
  void keep_best(int64_t query) {
    const std::vector<uint64_t>& keys = score_all(query);
    State& state = states_[query];
    state.count = static_cast<int64_t>(keys.size());
    for (int64_t i = 0; i < state.count; ++i) {
      highs(query)[i] = lows(query)[i] = half_score(scorer_.differences(), score_of(keys[i]));
      rows_of(query)[i] = row_of(keys[i]);
    }
    if (state.count == k_) {
      thresholds_.raise(query, highs(query)[k_ - 1]);
    }
    state.next = std::min(room_ - 2 * kLanes, state.count + std::max<int64_t>(32, k_));
  }

  // Keys of the k best entries by exact score, best first. The likely best are scored first: their scores exclude most of
  // the others without scoring them.
  const std::vector<uint64_t>& score_all(int64_t query) {
    State& state = states_[query];
    const float *high = highs(query), *low = lows(query);
    const uint32_t* rows = rows_of(query);
    std::vector<uint64_t>&order = score_buffers.order, &keys = score_buffers.keys;
    order.resize(state.count);
    for (int64_t i = 0; i < state.count; ++i) {
      order[i] = as_key(high[i] + low[i], static_cast<uint32_t>(i));
    }
    const int64_t first = std::min(k_, state.count);
    if (state.count > first) {
      std::nth_element(order.begin(), order.begin() + first, order.end(), std::greater<>());
    }
    keys.clear();
    float worst = std::numeric_limits<float>::infinity();
    const auto score = [&](int64_t entry) {
      const float exact = exact_score_of(query, rows[entry]);
      ++state.scored;
      worst = std::min(worst, exact);
      if (std::isfinite(exact)) {
        keys.push_back(as_key(exact, rows[entry]));
      }
    };
    for (int64_t i = 0; i < first; ++i) {
      score(row_of(order[i]));
    }
    const float needed = first == k_ ? half_score(scorer_.differences(), worst) : kNever;
    for (int64_t i = first; i < state.count; ++i) {
      if (high[row_of(order[i])] >= needed) {
        score(row_of(order[i]));
      }
    }
    const int64_t best = std::min<int64_t>(k_, keys.size());
    std::partial_sort(keys.begin(), keys.begin() + best, keys.end(), std::greater<>());
    keys.resize(best);
    return keys;
  }

  int64_t d_, k_, room_;
  const float* x_;
  const RowScorer& scorer_;
  Thresholds& thresholds_;
  std::unique_ptr<float[]> bounds_; // (queries, 2, room): optimistic and pessimistic
  std::unique_ptr<uint32_t[]> rows_; // (queries, room)
  std::vector<State> states_;
};

// Take all rows of a visit by their exact scores, for some of its tasks: rows or queries of which codes say nothing. The
// filter counts queries from the block's first and rows from the list's.
inline void score_rows(
    const Problem& p, const Visit& visit, const Task* tasks, int64_t count, const RowFilter& filter, Candidates& found) {
  const Segment& segment = p.segments[visit.segment];
  const int64_t before = p.rows_before(visit.segment) + visit.start;
  for (int64_t t = 0; t < count; ++t) {
    for (int64_t row = visit.first; row < std::min<int64_t>(visit.last, tasks[t].limit); ++row) {
      const bool masked = segment.bias && segment.bias[visit.start + row] == kNever;
      if (!masked && filter.passes(tasks[t].query, row)) {
        found.score(tasks[t].query, static_cast<uint32_t>(before + row));
      }
    }
  }
}

} // namespace torch_ivf_module
