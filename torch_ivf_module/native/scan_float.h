// The scan in float32: ranking scores, by panels of rows where many queries visit a list and row by row where few do.
#pragma once

#include <cstring>

#include "microkernels.h"

namespace torch_ivf_module {

// Number of queries of a list from which copying its rows into panels is faster. On AVX-512, 6 and 12 were slower.
constexpr int64_t kPackPays = 24;
// Rows to prefetch if rows are read one by one. On Zen 3, 8 and 32 groups took 15 and 35% longer, and none 70%.
constexpr int64_t kAhead = 2 * kRows;
// Bytes of panels at a time: with the queries that are multiplied with them they stay in a second-level cache.
constexpr int64_t kSectionBytes = 128 << 10;

// Up to this number of tasks, squared distances are sums of squared differences, which have small rounding errors; reading
// the rows takes longer than computing them. With more tasks products are used, which are faster.
constexpr int64_t kFewDifferences = kFew;

// Values of the queries for a scan by squared distances.
struct Distances {
  const float* x; // (Q, d) not relative to the origin
  const float* highest; // (Q,) the ranking score of a row that equals the query; others have half the square less
  const float* origin; // (d,) that panels are made relative to, as the queries of the problem are; or null
  const float* offsets; // (Q,) the product of the query with that origin
};

// Some tasks and kRows rows, of which `count` are there.
template <typename T>
struct RowGroup {
  const Task* tasks;
  int64_t query; // of the block's first
  std::array<RowReader<T>, kRows> rows;
  const float* bias; // of kRows rows, or null
  int64_t number; // of the first row
  int64_t row; // the same, counted in its list
  int64_t count;
  RowFilter filter; // counts queries from the block's first and rows from the list's
};

// Scores of kRows rows.
using Four = float __attribute__((vector_size(16)));

inline Four four_at(const float* from) {
  Four values;
  std::memcpy(&values, from, sizeof(values));
  return values;
}

template <int M, bool Differences, typename T, typename Found>
void offer_rows(const Problem& p, const Distances* distances, const RowGroup<T>& group, Found& found) {
  std::array<const float*, kFew> queries;
  const float* x = Differences ? distances->x : p.x;
  for (int m = 0; m < M; ++m) {
    queries[m] = x + (group.query + group.tasks[m].query) * p.d;
  }
  float sums[kFew][kRows];
  row_sums<M, Differences, T>(queries, group.rows, p.d, sums);
  for (int m = 0; m < M; ++m) {
    const int64_t query = group.tasks[m].query;
    const float threshold = found.threshold(query);
    const int64_t end = std::min(group.count, group.tasks[m].limit - group.row);
    const float highest = Differences ? distances->highest[group.query + query] : 0.0f;
    const float offset = !Differences && distances && distances->offsets ? distances->offsets[group.query + query] : 0.0f;
    const Four sum = four_at(sums[m]);
    const Four scores = Differences ? highest - sum / 2 : sum + (group.bias ? four_at(group.bias) : Four{}) - offset;
    const auto above = scores > threshold; // -1 where it is so
    if (!(above[0] | above[1] | above[2] | above[3])) {
      continue;
    }
    for (int64_t i = 0; i < end; ++i) {
      const bool excluded = Differences && group.bias && group.bias[i] == kNever;
      if (above[i] && !excluded && group.filter.passes(query, group.row + i)) {
        found.offer(query, scores[i], static_cast<uint32_t>(group.number + i));
      }
    }
  }
}

template <typename T>
class FloatScanner {
 public:
  // With `distances` and an origin there, rows are multiplied relative to it, as queries are: rounding errors are then of
  // the size of distances, not of the vectors. Single rows are multiplied as they are.
  explicit FloatScanner(const Problem& problem, const Distances* distances = nullptr)
      : problem_(problem), distances_(distances) {}

  template <typename Found>
  void scan(const Visit& visit, int64_t query, Found& found) {
    const bool differences = distances_ && visit.count <= kFewDifferences;
    const Rounding rounding = differences ? kByDifferences : visit.count < kPackPays ? kAlongRows : kByPanels;
    for (int64_t t = 0; t < visit.count; ++t) {
      found.note(visit.tasks[t].query, rounding);
    }
    if (differences) {
      scan_rows<true>(visit, query, found);
    } else if (visit.count < kPackPays) {
      scan_rows<false>(visit, query, found);
    } else {
      scan_panels(visit, query, found);
    }
  }

 private:
  template <typename Found>
  void scan_panels(const Visit& visit, int64_t query, Found& found) {
    const Segment& segment = problem_.segments[visit.segment];
    const int64_t section = std::max<int64_t>(1, kSectionBytes / (4 * problem_.d * kPanel)) * kPanel;
    float* panels = take(panels_, section * problem_.d);
    float* bias = take(bias_, section);
    const int64_t number = problem_.rows_before(visit.segment) + visit.start; // of the list's first row
    const RowFilter filter = problem_.filter(query, segment, visit.start);
    for (int64_t row = visit.first; row < visit.last; row += section) {
      const int64_t rows = std::min(section, visit.last - row);
      const int64_t at = visit.start + row;
      const float* from = as_float(row_at<T>(segment.packed, at, problem_.d), rows, problem_.d, take(rows_, section * problem_.d));
      pack_panels(from, rows, problem_.d, panels);
      if (distances_ && distances_->origin) {
        centre_panels(panels, rows, problem_.d, distances_->origin);
      }
      for (int64_t i = 0; i < section; ++i) {
        bias[i] = i >= rows ? kNever : segment.bias ? segment.bias[at + i] : 0.0f;
      }
      for (int64_t t = 0; t < visit.count && visit.tasks[t].limit > row; t += kQueries) {
        const Task* tasks = visit.tasks + t;
        const int group = static_cast<int>(std::min<int64_t>(kQueries, visit.count - t));
        std::array<const float*, kQueries> queries;
        for (int m = 0; m < group; ++m) {
          queries[m] = problem_.x + (query + tasks[m].query) * problem_.d;
        }
        for (int64_t i = 0; i < rows && row + i < tasks->limit; i += kPanel) {
          with_count<kQueries>(group, [&](auto m) {
            panel_product<m>(queries, panels + i * problem_.d, bias + i, problem_.d, [&](int q, Vec low, Vec high) {
              offer_panel(low, high, tasks[q], number, row + i, panels + i * problem_.d, filter, found);
            });
          });
        }
      }
    }
  }

  template <bool Differences, typename Found>
  void scan_rows(const Visit& visit, int64_t query, Found& found) {
    const Segment& segment = problem_.segments[visit.segment];
    const int64_t before = problem_.rows_before(visit.segment);
    const RowFilter filter = problem_.filter(query, segment, visit.start);
    for (int64_t row = visit.first; row < visit.last && row < visit.tasks->limit; row += kRows) {
      const int64_t at = visit.start + row, count = std::min<int64_t>(kRows, visit.last - row);
      // The hardware prefetcher stops at the end of a page; this reaches into the next one.
      const char* ahead = row_at<char>(segment.packed, 0, 1) + (at + kAhead) * problem_.row_bytes;
      for (int64_t i = 0; i < kRows * problem_.row_bytes; i += 64) {
        __builtin_prefetch(ahead + i);
      }
      float bias[kRows] = {};
      const float* biases = segment.bias ? segment.bias + at : nullptr;
      if (biases && count < kRows) {
        biases = std::copy_n(biases, count, bias) - count;
      }
      RowGroup<T> group{visit.tasks, query, {}, biases, before + at, row, count, filter};
      for (int64_t i = 0; i < kRows; ++i) {
        group.rows[i] = {row_at<T>(segment.packed, at + std::min(i, count - 1), problem_.d), problem_.d};
      }
      for (int64_t t = 0; t < visit.count && visit.tasks[t].limit > row; t += kFew) {
        const auto offer = visit.count - t >= 3 ? offer_rows<3, Differences, T, Found>
          : visit.count - t == 2 ? offer_rows<2, Differences, T, Found>
                                 : offer_rows<1, Differences, T, Found>;
        group.tasks = visit.tasks + t;
        offer(problem_, distances_, group, found);
      }
    }
  }

  const Problem& problem_;
  const Distances* distances_;
  std::vector<float> rows_, panels_, bias_;
};

} // namespace torch_ivf_module
