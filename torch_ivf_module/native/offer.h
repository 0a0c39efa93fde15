// From products in registers to what is wanted of them.
#pragma once

#include <ATen/cpu/vec/functional.h>
#include <ATen/cpu/vec/vec.h>
#include <c10/util/llvmMathExtras.h>

#include "best.h"
#include "tasks.h"

namespace torch_ivf_module {

using Vec = at::vec::Vectorized<float>;
constexpr int64_t kLanes = Vec::size();

// Rows of a panel: two vectors. With six queries that is twelve sums, which with two rows and a query are nearly the
// sixteen registers of AVX2; AVX-512 has thirty-two.
constexpr int64_t kPanel = 2 * kLanes;
#if defined(CPU_CAPABILITY_AVX512)
constexpr int kQueries = 12;
#else
constexpr int kQueries = 6;
#endif

// Sums stay in registers only where every loop over them is unrolled.
#define UNROLLED _Pragma("GCC unroll 16")

inline float sum_of(const Vec& values) {
  return at::vec::vec_reduce_all<float>([](const Vec& a, const Vec& b) { return a + b; }, values);
}

// One bit for each score that is above the floor.
inline unsigned above(const Vec& scores, const Vec& floor) {
  return ~static_cast<unsigned>((scores > floor).zero_mask()) & ((1u << kLanes) - 1);
}

// Rarely called: most rows are not wanted. `found` is Best or Hits.
template <typename Found>
C10_NOINLINE void offer_some(
    const Vec (&scored)[2], uint64_t which, Task task, int64_t start, int64_t row, Found& found) {
  float scores[kPanel];
  scored[0].store(scores);
  scored[1].store(scores + kLanes);
  for (; which; which &= which - 1) {
    const int64_t i = c10::llvm::countTrailingZeros(which);
    if (row + i < task.limit) {
      found.offer(task.query, scores[i], static_cast<uint32_t>(start + row + i));
    }
  }
}

// Offer the scores of a panel whose first row is `row` of a list that begins at `start`.
template <typename Found>
void offer_panel(const Vec& low, const Vec& high, Task task, int64_t start, int64_t row, Found& found) {
  const Vec floor(found.floor(task.query));
  const uint64_t which = above(low, floor) | static_cast<uint64_t>(above(high, floor)) << kLanes;
  if (which) {
    const Vec scored[2] = {low, high};
    offer_some(scored, which, task, start, row, found);
  }
}

// call(integral_constant<int, count>), for a count from 1 to Most that is known only now.
template <int Most, typename Call>
void with_count(int count, const Call& call) {
  if constexpr (Most > 1) {
    if (count < Most) {
      return with_count<Most - 1>(count, call);
    }
  }
  call(std::integral_constant<int, Most>());
}

// Memory that is kept from one list to the next.
template <typename T>
T* take(std::vector<T>& from, int64_t count) {
  if (static_cast<int64_t>(from.size()) < count) {
    from.resize(count);
  }
  return from.data();
}

} // namespace torch_ivf_module
