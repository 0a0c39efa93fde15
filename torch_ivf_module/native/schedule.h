// The work of a scan: which queries visit which lists, and how it is divided among threads.
//
// Q queries, L lists, P probes, N vectors, d dim, k results, T tasks (a query and one of its lists).
#pragma once

#include <algorithm>
#include <cstdint>
#include <limits>
#include <vector>

#include "core.h"
#include "threads.h"
#include "topk.h"

namespace torch_ivf_module {

// Tasks a list and thread from which threads divide the queries; every thread then reads and packs the lists itself. With
// fewer tasks they divide the rows, and each keeps the best rows of every query. An estimate: other values were not tried.
constexpr int64_t kShareQueries = 64;
// Tasks a list that one block of queries should have, where there are enough for more blocks than threads.
constexpr int64_t kBlockTasks = 512;
// Lists are cut between threads at multiples of so many rows, so that panels are full.
constexpr int64_t kCut = 64;

struct Task {
  int32_t query; // counted from the first of its block
  int32_t limit; // only so many rows of the list, from its first, are scanned
};

// The tasks of some queries, list by list.
struct Tasks {
  int64_t first_query;
  std::vector<int32_t> lists; // those that have tasks, the nearest list of some query first
  std::vector<int64_t> starts; // (L + 1,)
  std::vector<Task> tasks; // (T,) in the order of the lists' numbers

  int64_t count(int32_t list) const {
    return starts[list + 1] - starts[list];
  }
};

// The probes [probe, last_probe) of queries [query, last_query).
inline Tasks tasks_of(const Problem& p, int64_t query, int64_t last_query, int64_t probe, int64_t last_probe) {
  Tasks out{query, {}, std::vector<int64_t>(p.lists + 2, 0), {}};
  for (int64_t j = probe; j < last_probe; ++j) {
    for (int64_t q = query; q < last_query; ++q) {
      const int64_t list = p.probed[q * p.probes + j];
      if (list < p.lists && out.starts[list + 1]++ == 0) {
        out.lists.push_back(static_cast<int32_t>(list));
      }
    }
  }
  for (int64_t l = 0; l < p.lists; ++l) {
    out.starts[l + 1] += out.starts[l];
  }
  out.tasks.resize(out.starts[p.lists]);
  std::vector<int64_t> at(out.starts.begin(), out.starts.end());
  for (int64_t q = query; q < last_query; ++q) {
    for (int64_t j = probe; j < last_probe; ++j) {
      const int64_t list = p.probed[q * p.probes + j];
      if (list < p.lists) {
        const int64_t asked = p.limits ? p.limits[q * p.probes + j] : p.sizes[list];
        const int64_t limit = std::clamp<int64_t>(asked, 0, p.sizes[list]);
        out.tasks[at[list]++] = {static_cast<int32_t>(q - query), static_cast<int32_t>(limit)};
      }
    }
  }
  if (p.limits) {
    for (int32_t list : out.lists) {
      std::sort(out.tasks.begin() + out.starts[list], out.tasks.begin() + out.starts[list + 1], [](Task a, Task b) {
        return a.limit > b.limit;
      });
    }
  }
  return out;
}

// Some tasks of one list, and the rows that they are to be multiplied with.
struct Visit {
  const Task* tasks;
  int64_t count;
  int64_t start; // of the list in the packed rows
  int64_t first, last; // rows, counted in the list
};

// Cuts of the packed rows into shares of about equal work.
inline std::vector<int64_t> cuts_of(const Problem& p, const Tasks& tasks, int64_t shares) {
  std::vector<int32_t> lists(tasks.lists);
  std::sort(lists.begin(), lists.end(), [&](int32_t a, int32_t b) { return p.offsets[a] < p.offsets[b]; });
  double total = 0;
  for (int32_t list : lists) {
    total += static_cast<double>(p.sizes[list]) * tasks.count(list);
  }
  std::vector<int64_t> cuts{0};
  double before = 0;
  for (int32_t list : lists) {
    const double here = static_cast<double>(p.sizes[list]) * tasks.count(list);
    while (static_cast<int64_t>(cuts.size()) < shares && total * cuts.size() / shares <= before + here) {
      const double part = here > 0 ? (total * cuts.size() / shares - before) / here : 0;
      const int64_t row = static_cast<int64_t>(part * p.sizes[list]) / kCut * kCut;
      cuts.push_back(std::max(cuts.back(), p.offsets[list] + row));
    }
    before += here;
  }
  cuts.resize(shares, cuts.back());
  cuts.push_back(std::numeric_limits<int64_t>::max());
  return cuts;
}

// Scan the lists that have tasks, restricted to packed rows [first, last), for queries that `found` collects.
template <typename Scanner, typename Found>
void scan_tasks(const Problem& p, const Tasks& tasks, int64_t first, int64_t last, Found& found, Scanner& scanner) {
  for (int32_t list : tasks.lists) {
    const int64_t start = p.offsets[list];
    const Visit visit{
        tasks.tasks.data() + tasks.starts[list],
        tasks.count(list),
        start,
        std::max<int64_t>(0, first - start),
        std::min(p.sizes[list], last - start)};
    if (visit.first < visit.last) {
      scanner.scan(visit, tasks.first_query, found);
    }
  }
}

// Threads divide the queries. `scanner()` makes a scanner for one thread, `found(first, count)` what collects the rows of
// queries first to first + count.
template <typename Scanner, typename Found>
void scan_by_queries(
    const Problem& p, const Scanner& scanner, const Found& found, int64_t block, float* scores, int64_t* rows) {
  parallel_items((p.queries + block - 1) / block, [&](int64_t i) {
    const int64_t query = i * block, last = std::min(p.queries, query + block);
    auto best = found(query, last - query);
    auto scan = scanner();
    // The nearest lists first: their rows raise the thresholds before the others are read.
    const int64_t nearest = std::min<int64_t>(1, p.probes);
    const int64_t all = std::numeric_limits<int64_t>::max();
    scan_tasks(p, tasks_of(p, query, last, 0, nearest), 0, all, best, scan);
    scan_tasks(p, tasks_of(p, query, last, nearest, p.probes), 0, all, best, scan);
    for (int64_t q = query; q < last; ++q) {
      best.write(q - query, scores + q * p.k, rows + q * p.k);
    }
  });
}

// Threads divide the rows, for one block of queries at a time.
template <typename Scanner, typename Found>
void scan_by_rows(
    const Problem& p, const Scanner& scanner, const Found& found, int64_t block, float* scores, int64_t* rows) {
  const int64_t shares = num_threads();
  for (int64_t query = 0; query < p.queries; query += block) {
    const int64_t last = std::min(p.queries, query + block);
    const Tasks tasks = tasks_of(p, query, last, 0, p.probes);
    const std::vector<int64_t> cuts = cuts_of(p, tasks, shares);
    std::vector<decltype(found(query, last - query))> best;
    for (int64_t share = 0; share < shares; ++share) {
      best.push_back(found(query, last - query));
    }
    parallel_items(shares, [&](int64_t share) {
      auto scan = scanner();
      scan_tasks(p, tasks, cuts[share], cuts[share + 1], best[share], scan);
    });
    parallel_items(last - query, [&](int64_t i) {
      for (int64_t share = 1; share < shares; ++share) {
        best[0].merge(i, best[share]);
      }
      best[0].write(i, scores + (query + i) * p.k, rows + (query + i) * p.k);
    });
  }
}

// The k best rows of every query: scores and rows (Q, k).
template <typename Scanner, typename Found>
void scan_all(
    const Problem& p, const Scanner& scanner, const Found& found, int64_t max_bytes, float* scores, int64_t* rows) {
  if (p.queries == 0) {
    return;
  }
  const int64_t threads = num_threads();
  const int64_t tasks = p.queries * p.probes / std::max<int64_t>(1, p.lists); // a list
  const int64_t held = std::max<int64_t>(1, max_bytes / (8 * TopK::room(p.k) * threads + 24 * p.probes + 16));
  if (threads > 1 && tasks < kShareQueries * threads) {
    return scan_by_rows(p, scanner, found, std::min(held, p.queries), scores, rows);
  }
  const int64_t rounds = std::clamp<int64_t>(tasks / (kBlockTasks * threads), 1, 4);
  const int64_t even = (p.queries + threads * rounds - 1) / (threads * rounds);
  scan_by_queries(p, scanner, found, std::min(held, even), scores, rows);
}

} // namespace torch_ivf_module
