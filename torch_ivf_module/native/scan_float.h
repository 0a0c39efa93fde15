// The scan in float32: ranking scores, by panels of rows where many queries visit a list and row by row where few do.
#pragma once

#include "microkernels.h"

namespace torch_ivf_module {

// Queries that visit a list from which copying its rows into panels pays. On AVX-512, 6 and 12 were slower.
constexpr int64_t kPackPays = 24;
constexpr int64_t kAhead = 8 * kRows; // rows fetched ahead where they are read once
// Bytes of panels at a time: with the queries that are multiplied with them they stay in a second-level cache.
constexpr int64_t kSectionBytes = 128 << 10;

template <int M, typename Found>
void offer_rows(
    const Problem& p,
    const Task* tasks,
    int64_t query,
    const std::array<const float*, kRows>& rows,
    const float* bias, // of these rows, or null
    int64_t number, // of the first row
    int64_t row, // the same, counted in its list
    int64_t count,
    const float* offsets,
    Found& found) {
  std::array<const float*, kFew> queries;
  for (int m = 0; m < M; ++m) {
    queries[m] = p.x + (query + tasks[m].query) * p.d;
  }
  float scores[kFew][kRows];
  row_product<M>(queries, rows, p.d, scores);
  for (int m = 0; m < M; ++m) {
    const float threshold = found.threshold(tasks[m].query);
    const int64_t end = std::min(count, tasks[m].limit - row);
    for (int64_t i = 0; i < end; ++i) {
      const float score = scores[m][i] + (bias ? bias[i] : 0.0f) - (offsets ? offsets[query + tasks[m].query] : 0.0f);
      if (score > threshold) {
        found.offer(tasks[m].query, score, static_cast<uint32_t>(number + i));
      }
    }
  }
}

template <typename T>
class FloatScanner {
 public:
  // With an `origin` (d), and the product of each query with it (Q,), rows are multiplied relative to it, as queries are:
  // rounding errors are then of the size of distances, not of the vectors. Single rows are multiplied as they are.
  explicit FloatScanner(const Problem& problem, const float* origin = nullptr, const float* offsets = nullptr)
      : problem_(problem), origin_(origin), offsets_(offsets) {}

  template <typename Found>
  void scan(const Visit& visit, int64_t query, Found& found) {
    if (visit.count < kPackPays) {
      scan_rows(visit, query, found);
    } else {
      scan_panels(visit, query, found);
    }
  }

 private:
  template <typename Found>
  void scan_panels(const Visit& visit, int64_t query, Found& found) {
    const Segment& segment = problem_.segments[visit.segment];
    const T* packed = static_cast<const T*>(segment.packed);
    const int64_t section = std::max<int64_t>(1, kSectionBytes / (4 * problem_.d * kPanel)) * kPanel;
    float* panels = take(panels_, section * problem_.d);
    float* bias = take(bias_, section);
    const int64_t number = problem_.rows_before(visit.segment) + visit.start; // of the list's first row
    for (int64_t row = visit.first; row < visit.last; row += section) {
      const int64_t rows = std::min(section, visit.last - row);
      const int64_t at = visit.start + row;
      const float* from = as_float(packed + at * problem_.d, rows * problem_.d, take(rows_, section * problem_.d));
      pack_panels(from, rows, problem_.d, panels);
      if (origin_) {
        centre_panels(panels, rows, problem_.d, origin_);
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
              offer_panel(low, high, tasks[q], number, row + i, panels + i * problem_.d, found);
            });
          });
        }
      }
    }
  }

  template <typename Found>
  void scan_rows(const Visit& visit, int64_t query, Found& found) {
    const Segment& segment = problem_.segments[visit.segment];
    const T* packed = static_cast<const T*>(segment.packed);
    const int64_t before = problem_.rows_before(visit.segment);
    for (int64_t row = visit.first; row < visit.last && row < visit.tasks->limit; row += kRows) {
      const int64_t at = visit.start + row;
      const int64_t count = std::min<int64_t>(kRows, visit.last - row);
      // The hardware prefetcher stops at the end of a page; this reaches into the next one.
      for (int64_t i = 0; i < kRows * problem_.d; i += 64 / static_cast<int64_t>(sizeof(T))) {
        __builtin_prefetch(packed + (at + kAhead) * problem_.d + i);
      }
      const float* from = as_float(packed + at * problem_.d, count * problem_.d, take(rows_, kRows * problem_.d));
      const float* bias = segment.bias ? segment.bias + at : nullptr;
      std::array<const float*, kRows> rows;
      for (int64_t i = 0; i < kRows; ++i) {
        rows[i] = from + std::min(i, count - 1) * problem_.d;
      }
      for (int64_t t = 0; t < visit.count && visit.tasks[t].limit > row; t += kFew) {
        const auto offer = visit.count - t >= 3 ? offer_rows<3, Found>
          : visit.count - t == 2 ? offer_rows<2, Found>
                                 : offer_rows<1, Found>;
        offer(problem_, visit.tasks + t, query, rows, bias, before + at, row, count, offsets_, found);
      }
    }
  }

  const Problem& problem_;
  const float* origin_;
  const float* offsets_;
  std::vector<float> rows_, panels_, bias_;
};

} // namespace torch_ivf_module
