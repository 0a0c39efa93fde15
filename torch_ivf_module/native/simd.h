// Panels of rows, and the test of their scores against a query's threshold.
#pragma once

#include <type_traits>
#include <vector>

#include "schedule.h"
#include "topk.h"
#include "vec.h"

namespace torch_ivf_module {

// Rows of a panel: two vectors. With six queries there are twelve sums. Together with two vectors of rows and one of a
// query they use 15 of the 16 registers of AVX2. AVX-512 has 32.
constexpr int64_t kPanel = 2 * kLanes;
#if defined(__AVX512F__)
constexpr int kQueries = 12;
#else
constexpr int kQueries = 6;
#endif

// Offer the rows of a panel whose bit is set in `which`. Rarely called: most rows do not exceed the threshold. `found` is
// a TopK or RangeHits, which take ranking scores, or an ExactTopK, which has its own for a whole panel.
template <typename Found>
__attribute__((noinline)) void offer_some(
    const Vec (&scored)[2],
    uint64_t which,
    Task task,
    int64_t start,
    int64_t row,
    const float* panel,
    const RowFilter& filter,
    Found& found) {
  float scores[kPanel];
  if constexpr (Found::kExact) {
    found.score_panel(task.query, panel, scores);
  } else {
    scored[0].store(scores);
    scored[1].store(scores + kLanes);
  }
  for (; which; which &= which - 1) {
    const int64_t i = __builtin_ctzll(which);
    if (row + i < task.limit && filter.passes(task.query, row + i)) {
      found.take(task.query, scores[i], static_cast<uint32_t>(start + row + i));
    }
  }
}

// Offer the scores of a panel (d, kPanel) whose first row is `row` of a list that begins at packed row `start`; the filter
// counts rows from there.
template <typename Found>
void offer_panel(
    const Vec& low, const Vec& high, Task task, int64_t start, int64_t row, const float* panel, const RowFilter& filter,
    Found& found) {
  const Vec threshold(found.threshold(task.query));
  const uint64_t which = exceeding(low, threshold) | static_cast<uint64_t>(exceeding(high, threshold)) << kLanes;
  if (which) {
    const Vec scored[2] = {low, high};
    offer_some(scored, which, task, start, row, panel, filter, found);
  }
}

// call(integral_constant<int, count>) for a count from 1 to Most that is known at run time only.
template <int Most, typename Call>
void with_count(int count, const Call& call) {
  if constexpr (Most > 1) {
    if (count < Most) {
      return with_count<Most - 1>(count, call);
    }
  }
  call(std::integral_constant<int, Most>());
}

// At least `count` entries of a buffer that is kept from one list to the next.
template <typename T>
T* take(std::vector<T>& buffer, int64_t count) {
  if (static_cast<int64_t>(buffer.size()) < count) {
    buffer.resize(count);
  }
  return buffer.data();
}

} // namespace torch_ivf_module
