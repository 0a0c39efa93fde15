// The work of a scan: which queries visit which lists, cut into items that threads take one after the other.
//
// Q queries, L lists, P probes, N vectors, d dim, k results, T tasks (a query and one of its lists), S segments (sets of
// inverted lists over the same centroids, whose rows are counted on from one to the next).
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstdio>
#include <stdexcept>
#include <utility>
#include <vector>

#include "core.h"
#include "threads.h"

namespace torch_ivf_module {

// Tasks per list from which the queries are divided into blocks, one for each thread. Thresholds then rise as fast as with
// one thread, and rows are copied into panels once per block. With fewer tasks all threads share one block.
constexpr int64_t kBlockTasks = 128;
constexpr int64_t kMostBlockTasks = 512; // of blocks that one thread scans one after the other
// Tasks per list from which the nearest list of each query is scanned before all other lists, although rows are then read
// twice.
constexpr int64_t kNearestFirst = 64;
// Lists are cut at multiples of so many rows, so that panels are full.
constexpr int64_t kCut = 64, kCodedItem = 1024;
// Estimates for one core with AVX2: bytes read and multiply-adds in a nanosecond.
constexpr double kBytesPerNanosecond = 16;
constexpr double kWorkPerNanosecond = 16, kCodedWorkPerNanosecond = 64;
// The time of an item. If the system interrupts a thread, the others wait for its item at the end.
constexpr double kItemNanoseconds = 4e5;

// Rows that a query reads of a list in one segment.
inline int64_t rows_to_read(const Problem& p, int segment, int64_t query, int64_t probe, int64_t list) {
  const int64_t size = p.segments[segment].sizes[list];
  if (!p.limits) {
    return size;
  }
  const int64_t before = segment == 0 ? 0 : p.segments[0].sizes[list];
  return std::clamp<int64_t>(p.limits[query * p.probes + probe] - before, 0, size);
}

// The number of a list that is read, or -1 for none. Throws if its rows do not lie in the packed ones.
inline int64_t list_at(const Problem& p, int segment, int64_t query, int64_t probe) {
  const int64_t list = p.probed[query * p.probes + probe];
  if (list < 0) {
    throw std::runtime_error("probed must have no list below 0");
  }
  if (list >= p.lists) {
    return -1;
  }
  const Segment& held = p.segments[segment];
  const int64_t offset = held.offsets[list], size = held.sizes[list];
  if (offset < 0 || size < 0 || size > held.rows || offset > held.rows - size) {
    char text[160];
    constexpr const char* kForm = "list %lld must lie in packed, got rows %lld and %lld more";
    std::snprintf(
        text, sizeof(text), kForm, static_cast<long long>(list), static_cast<long long>(offset),
        static_cast<long long>(size));
    throw std::runtime_error(text);
  }
  return size > 0 ? list : -1;
}

struct Task {
  int32_t query; // counted from the first of its block
  int32_t limit; // only so many rows of the list, from its first, are scanned
};

// The tasks of one list.
struct Group {
  int32_t list;
  int32_t segment;
  int64_t first, count; // in the tasks of the block, the one with the highest limit first
};

// Rows of one list, to be multiplied with the queries of its tasks.
struct Visit {
  const Task* tasks;
  int64_t count;
  int segment;
  int64_t list;
  int64_t start; // of the list in the packed rows of the segment
  int64_t first, last; // rows, counted in the list
  int64_t next; // list of the item after this one, or -1
};

struct Item {
  int32_t group;
  int32_t first, last; // rows, counted in the list
};

// Some queries and what is to be done for them.
class Block {
 public:
  int64_t first_query = 0, queries = 0;
  std::vector<Task> tasks;
  std::vector<Group> groups;
  std::vector<Item> items;
  std::atomic<int64_t> next{0}; // item that no thread has taken

  // List by list: the nearest lists of all queries, then the others in the order in which queries visit them, so that
  // thresholds are high before most rows are read.
  void plan(const Problem& p, int64_t first, int64_t last) {
    first_query = first;
    queries = last - first;
    for (int segment = 0; segment < p.segment_count; ++segment) {
      if (queries == 1) {
        plan_alone(p, segment);
      } else {
        const int64_t nearest = queries * p.probes >= kNearestFirst * p.lists ? std::min<int64_t>(1, p.probes) : 0;
        add(p, segment, 0, nearest);
        add(p, segment, nearest, p.probes);
      }
    }
    for (size_t group = 0; group < groups.size(); ++group) {
      cut(p, static_cast<int32_t>(group));
    }
  }

  Visit visit(const Problem& p, int64_t item) const {
    const Item& rows = items[item];
    const Group& group = groups[rows.group];
    const int64_t start = p.segments[group.segment].offsets[group.list];
    const bool more = item + 1 < static_cast<int64_t>(items.size()) && groups[items[item + 1].group].segment == group.segment;
    const int64_t next = more ? groups[items[item + 1].group].list : -1;
    return {tasks.data() + group.first, group.count, group.segment, group.list, start, rows.first, rows.last, next};
  }

  // Estimated for one thread.
  double nanoseconds() const {
    return nanoseconds_;
  }

 private:
  // Plan for a block of one query: each of its lists has one task.
  void plan_alone(const Problem& p, int segment) {
    for (int64_t j = 0; j < p.probes; ++j) {
      const int64_t list = list_at(p, segment, first_query, j);
      const int64_t limit = list < 0 ? 0 : rows_to_read(p, segment, first_query, j, list);
      if (limit > 0) {
        groups.push_back({static_cast<int32_t>(list), segment, static_cast<int64_t>(tasks.size()), 1});
        tasks.push_back({0, static_cast<int32_t>(limit)});
      }
    }
  }

  // The probes [probe, last_probe) of the queries, sorted by list in the order in which they are first visited.
  void add(const Problem& p, int segment, int64_t probe, int64_t last_probe) {
    if (probe == last_probe) {
      return;
    }
    std::vector<int32_t> group_of(p.lists, -1);
    const size_t before = groups.size();
    for (int64_t j = probe; j < last_probe; ++j) {
      for (int64_t q = first_query; q < first_query + queries; ++q) {
        const int64_t list = list_at(p, segment, q, j);
        if (list >= 0) {
          int32_t& group = group_of[list];
          if (group < 0) {
            group = static_cast<int32_t>(groups.size());
            groups.push_back({static_cast<int32_t>(list), segment, 0, 0});
          }
          ++groups[group].count;
        }
      }
    }
    int64_t end = static_cast<int64_t>(tasks.size());
    for (size_t i = before; i < groups.size(); ++i) {
      groups[i].first = end;
      end += groups[i].count;
      groups[i].count = 0;
    }
    tasks.resize(end);
    for (int64_t q = first_query; q < first_query + queries; ++q) {
      for (int64_t j = probe; j < last_probe; ++j) {
        const int64_t list = p.probed[q * p.probes + j];
        if (list < p.lists && group_of[list] >= 0) {
          Group& group = groups[group_of[list]];
          const int64_t limit = rows_to_read(p, segment, q, j, list);
          tasks[group.first + group.count++] = {static_cast<int32_t>(q - first_query), static_cast<int32_t>(limit)};
        }
      }
    }
    for (size_t i = before; p.limits && i < groups.size(); ++i) {
      const auto begin = tasks.begin() + groups[i].first;
      std::stable_sort(begin, begin + groups[i].count, [](Task a, Task b) { return a.limit > b.limit; });
    }
  }

  // Cut a list into items.
  void cut(const Problem& p, int32_t number) {
    const Group& group = groups[number];
    const bool coded = p.coded && group.segment == 0; // whose order in panels is another one
    const int64_t rows = coded ? p.segments[0].sizes[group.list] : tasks[group.first].limit;
    const double work = coded ? kCodedWorkPerNanosecond : kWorkPerNanosecond;
    const double bytes = coded ? p.d : p.row_bytes;
    const double row = bytes / kBytesPerNanosecond + group.count * p.d / work; // nanoseconds
    const int64_t least = coded ? kCodedItem : kCut; // queries are coded anew for each item
    const int64_t step = std::max(least, static_cast<int64_t>(kItemNanoseconds / row) / kCut * kCut);
    for (int64_t first = 0; first < rows; first += step) {
      items.push_back({number, static_cast<int32_t>(first), static_cast<int32_t>(std::min(rows, first + step))});
    }
    nanoseconds_ += rows * row;
  }

  double nanoseconds_ = 0;
};

// All items of a scan, in blocks of queries that fit into memory together.
class Schedule {
 public:
  Schedule(const Problem& p, int64_t first_query, int64_t last_query)
      : apart_(parts(p, last_query - first_query)),
        blocks_(apart_ * blocks_a_part(p, last_query - first_query)) {
    const int64_t queries = last_query - first_query, blocks = static_cast<int64_t>(blocks_.size());
    const double planning = 10.0 * queries * p.probes;
    parallel_items(blocks, team_for(planning, p.within.threads), [&](int64_t i, int64_t) {
      blocks_[i].plan(p, first_query + queries * i / blocks, first_query + queries * (i + 1) / blocks);
    });
    for (const Block& block : blocks_) {
      items_ += static_cast<int64_t>(block.items.size());
      nanoseconds_ += block.nanoseconds();
    }
    team_ = team_for(nanoseconds_, std::min(p.within.threads, std::max<int64_t>(1, items_)));
  }

  std::vector<Block>& blocks() {
    return blocks_;
  }
  int64_t items() const {
    return items_;
  }
  int64_t team() const {
    return team_;
  }

  // The next item for a thread: its block, and the number in there. It keeps to one block as long as that has any. To be
  // called `items()` times in all.
  std::pair<int64_t, int64_t> take(int64_t member) {
    const int64_t blocks = static_cast<int64_t>(blocks_.size()), each = blocks / apart_;
    for (int64_t i = 0; i < blocks; ++i) {
      const int64_t number = (member + i / each) % apart_ * each + i % each;
      Block& block = blocks_[number];
      const int64_t count = static_cast<int64_t>(block.items.size());
      if (block.next.load(std::memory_order_relaxed) < count) {
        const int64_t item = block.next.fetch_add(1, std::memory_order_relaxed);
        if (item < count) {
          return {number, item};
        }
      }
    }
    throw std::logic_error("no item is left");
  }

 private:
  // Parts of the queries, each of which one thread keeps to.
  static int64_t parts(const Problem& p, int64_t queries) {
    const int64_t most = std::min(p.within.threads, queries);
    return std::clamp<int64_t>(tasks_a_list(p, queries) / kBlockTasks, 1, std::max<int64_t>(1, most));
  }

  // Blocks of such a part, or fewer where there are not as many queries.
  static int64_t blocks_a_part(const Problem& p, int64_t queries) {
    const int64_t part = queries / parts(p, queries);
    const int64_t wanted = (tasks_a_list(p, part) + kMostBlockTasks - 1) / kMostBlockTasks;
    return std::clamp<int64_t>(wanted, 1, std::max<int64_t>(1, part));
  }

  static int64_t tasks_a_list(const Problem& p, int64_t queries) {
    return queries * p.probes / std::max<int64_t>(1, p.lists);
  }

  int64_t apart_;
  std::vector<Block> blocks_;
  int64_t items_ = 0, team_ = 1;
  double nanoseconds_ = 0;
};

} // namespace torch_ivf_module
