// A scan: the items of a schedule, and what their queries found.
//
// Q queries, k results.
#pragma once

#include <memory>
#include <vector>

#include "scan_float.h"
#include "schedule.h"
#include "topk.h"

namespace torch_ivf_module {

constexpr int64_t kFinishQueries = 16; // an item
constexpr double kSortNanoseconds = 20; // an estimate, of a result

// The results of each thread of a team for one block. They are created when a thread first needs them.
template <typename Found>
class TeamFound {
 public:
  TeamFound(int64_t queries, int64_t team) : thresholds_(queries), members_(team) {}

  template <typename Make>
  Found& of(int64_t member, const Make& make) {
    if (!members_[member]) {
      members_[member] = std::make_unique<Found>(make(thresholds_));
    }
    return *members_[member];
  }

  // The merged results of all threads for a query. Different queries may be merged at the same time.
  Found* merged(int64_t query) {
    Found* all = nullptr;
    for (const std::unique_ptr<Found>& member : members_) {
      if (member && all) {
        all->merge(query, *member);
      } else if (member) {
        all = member.get();
      }
    }
    return all;
  }

 private:
  Thresholds thresholds_;
  std::vector<std::unique_ptr<Found>> members_;
};

// Bytes that a scan takes for each query, of which `found` are for what one thread collects.
inline int64_t scan_bytes(const Problem& p, int64_t found) {
  constexpr int64_t kState = 32;
  return p.within.threads * (found + kState) + 24 * p.probes + 16;
}

// Scan for queries [first, last). `scanner()` makes a scanner for one thread, `found(query, count, thresholds)` what one
// thread collects for `count` queries from `query` on. Then finish(query, what was found, its number in that, member) is
// called for each query, with null where it reads no list; `nanoseconds` are an estimate of what that takes.
template <typename MakeScanner, typename MakeFound, typename Finish>
void scan_queries(
    const Problem& p, int64_t first, int64_t last, const MakeScanner& scanner, const MakeFound& found,
    double nanoseconds, const Finish& finish) {
  using Scanner = decltype(scanner());
  using Found = decltype(found(first, last, std::declval<Thresholds&>()));
  Schedule schedule(p, first, last);
  std::vector<TeamFound<Found>> results;
  results.reserve(schedule.blocks().size());
  for (const Block& block : schedule.blocks()) {
    results.emplace_back(block.queries, schedule.team());
  }
  std::vector<std::unique_ptr<Scanner>> scanners(schedule.team());
  parallel_items(schedule.items(), schedule.team(), [&](int64_t, int64_t member) {
    const auto [number, item] = schedule.take(member);
    const Block& block = schedule.blocks()[number];
    if (!scanners[member]) {
      scanners[member] = std::make_unique<Scanner>(scanner());
    }
    Found& mine = results[number].of(member, [&](Thresholds& thresholds) {
      return found(block.first_query, block.queries, thresholds);
    });
    scanners[member]->scan(block.visit(p, item), block.first_query, mine);
  });
  for (size_t number = 0; number < results.size(); ++number) {
    const Block& block = schedule.blocks()[number];
    const int64_t team = team_for(nanoseconds * block.queries, p.within.threads);
    parallel_items((block.queries + kFinishQueries - 1) / kFinishQueries, team, [&](int64_t i, int64_t member) {
      for (int64_t q = i * kFinishQueries; q < std::min(block.queries, (i + 1) * kFinishQueries); ++q) {
        finish(block.first_query + q, results[number].merged(q), q, member);
      }
    });
  }
}

// Scan for all queries, as many at a time as fit into memory. `bytes` are those of what one thread collects for a query.
template <typename MakeScanner, typename MakeFound, typename Finish>
void scan_all(
    const Problem& p, int64_t bytes, const MakeScanner& scanner, const MakeFound& found, double nanoseconds,
    const Finish& finish) {
  const int64_t step = std::max<int64_t>(1, p.within.max_bytes / scan_bytes(p, bytes));
  for (int64_t first = 0; first < p.queries; first += step) {
    scan_queries(p, first, std::min(p.queries, first + step), scanner, found, nanoseconds, finish);
  }
}

// The k best rows of each query by ranking score.
template <typename T>
void scan(const Problem& p, Best out) {
  scan_all(
      p, TopK::bytes(p.k), [&] { return FloatScanner<T>(p); },
      [&](int64_t, int64_t count, Thresholds& thresholds) { return TopK(count, p.k, thresholds); },
      kSortNanoseconds * p.k,
      [&](int64_t query, TopK* found, int64_t number, int64_t) {
        if (found) {
          found->write(number, out.scores + query * p.k, out.rows + query * p.k);
        } else {
          std::fill_n(out.scores + query * p.k, p.k, kNever);
          std::fill_n(out.rows + query * p.k, p.k, int64_t{-1});
        }
      });
}

} // namespace torch_ivf_module
