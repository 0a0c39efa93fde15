// Work on several threads, by those of torch.
#pragma once

#include <torch/csrc/stable/c/shim.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <stdexcept>

namespace torch_ivf_module {

inline int64_t num_threads() {
  uint32_t threads = 1;
  torch_get_num_threads(&threads);
  return threads;
}

// Call job(i) for every i below `count`, each on the next free thread.
template <typename Job>
void parallel_items(int64_t count, const Job& job) {
  struct Shared {
    const Job& job;
    std::atomic<int64_t> next;
    int64_t count;
  } shared{job, {0}, count};
  const auto work = [](int64_t, int64_t, void* context) {
    Shared& all = *static_cast<Shared*>(context);
    for (int64_t i = all.next++; i < all.count; i = all.next++) {
      all.job(i);
    }
  };
  if (torch_parallel_for(0, std::min(count, num_threads()), 1, work, &shared)) {
    throw std::runtime_error("a thread of the search failed");
  }
}

} // namespace torch_ivf_module
