// The first pass over rows that are stored as codes: those whose optimistic bound exceeds a query's threshold become
// candidates.
#pragma once

#include "candidates.h"
#include "code_tiles.h"
#include "coded_rows.h"
#include "scan_float.h"

namespace torch_ivf_module {

template <typename Code>
class RowScanner {
 public:
  RowScanner(const Problem& p, const RowQueries& queries)
      : p_(p),
        queries_(queries),
        groups_(groups_of<Code>(p.d)),
        section_(std::max<int64_t>(1, kSectionBytes / (groups_ * Panel::kGroup))),
        panels_(p.d, section_),
        codes_(groups_ * kQueries) {}

  void scan(const Visit& visit, int64_t query, Candidates& found) {
    const Segment& segment = p_.segments[visit.segment];
    filter_ = p_.filter(query, segment, visit.start);
    const int64_t most = visit.count <= kTogether ? std::min(kFewPanels, section_) : section_;
    const int64_t next = visit.next < 0 ? visit.start : segment.offsets[visit.next];
    for (int64_t row = visit.first; row < visit.last; row += most * kCodedRows) {
      Visit part = visit;
      part.first = row;
      part.last = std::min(visit.last, row + most * kCodedRows);
      if (!panels_.fill(segment, visit.start + row, part.last - row, visit.start + visit.last, next)) {
        score_rows(p_, part, visit.tasks, visit.count, filter_, found);
        continue;
      }
      for (int64_t t = 0; t < visit.count;) {
        const int64_t left = visit.count - t;
        const int64_t some = left < kTogether || left >= 2 * kTogether ? std::min<int64_t>(left, kTogether) : (left + 1) / 2;
        set_queries(part, query, visit.tasks + t, static_cast<int>(some), found);
        with_count<kTogether>(static_cast<int>(some), [&](auto m) { scan_panels<m>(part, found); });
        t += some;
      }
    }
  }

 private:
  static constexpr int64_t kFewPanels = 4; // panels that stay in a first-level cache
  static constexpr int kTogether = kQueries / 2; // each has two codes a number

  void set_queries(const Visit& part, int64_t query, const Task* tasks, int count, Candidates& found) {
    tasks_ = tasks;
    for (int m = 0; m < count; ++m) {
      const RowQueries::Query& one = queries_[query + tasks[m].query];
      for (int i = 0; i < 2; ++i) {
        start_[2 * m + i] = one.start[i] * kCentre<Code>;
        write_query_codes(queries_.codes(query + tasks[m].query, i), groups_, codes_.data() + 2 * m + i);
      }
      first_scale_[m] = one.scale[0];
      last_scale_[m] = one.scale[1];
      sum_[m] = one.sum;
      error_[m] = one.error;
      far_[m] = product_share(p_.d) * one.size;
      base_[m] = one.base + one.slack;
      slack_[m] = one.slack;
      if (one.known) {
        raise(m, found);
      } else {
        needed_[m] = std::numeric_limits<float>::infinity();
        score_rows(p_, part, tasks + m, 1, filter_, found);
      }
    }
  }

  // What the bound of a row must exceed, without the base.
  void raise(int m, Candidates& found) {
    needed_[m] = found.threshold(tasks_[m].query) - base_[m];
  }

  template <int M>
  void scan_panels(const Visit& part, Candidates& found) {
    for (int64_t row = 0; row < part.last - part.first; row += kTileRows) {
      scan_some<M>(part, row, found);
    }
  }

  // Rows [row, row + kTileRows) of the part.
  template <int M>
  __attribute__((noinline)) void scan_some(const Visit& part, int64_t row, Candidates& found) {
    const int64_t panel = row / kCodedRows, at = row % kCodedRows;
    Vec rows[kColumns][kCodeVectors];
    scan_tile<M, 2>(
        panels_.codes(panel) + 4 * at, codes_.data(), start_, needed_, groups_, 0,
        [&] {
          UNROLLED for (int c = 0; c < kColumns; ++c) {
            UNROLLED for (int v = 0; v < kCodeVectors; ++v) {
              rows[c][v] = Vec::loadu(panels_.column(panel, static_cast<Column>(c)) + at + v * kLanes);
            }
          }
          return [&](int m, int v, Vec first, Vec last) {
            const Vec rest = fmadd(rows[kReach][v], Vec(far_[m]), rows[kBias][v]);
            const Vec middle = fmadd(rows[kMiddle][v], Vec(sum_[m]), fmadd(rows[kSpread][v], Vec(error_[m]), rest));
            const Vec product = fmadd(first, Vec(first_scale_[m]), fmadd(last, Vec(last_scale_[m]), Vec(0.0f)));
            return fmadd(product, rows[kScale][v], middle);
          };
        },
        [&](int m, int v, Vec bound, unsigned which) {
          const Vec share(-2 * bias_share(p_.d)), slack(2 * slack_[m]);
          const Vec off = fmadd(rows[kReach][v], Vec(far_[m]), fmadd(rows[kSpread][v], Vec(error_[m]), Vec(0.0f)));
          const Vec width = fmadd(rows[kBias][v], share, fmadd(off, Vec(2.0f), slack));
          offer(m, bound + Vec(base_[m]), fmadd(width, Vec(1 + 16 * kUnit), Vec(0.0f)), which, part, row + v * kLanes, found);
        });
  }

  __attribute__((noinline)) void offer(
      int m, Vec high, Vec width, unsigned which, const Visit& part, int64_t row, Candidates& found) {
    const Task& task = tasks_[m];
    const int64_t readable = std::min<int64_t>(part.last, task.limit) - part.first - row;
    which &= readable >= kLanes ? ~0u : readable <= 0 ? 0u : (1u << readable) - 1;
    for (unsigned rest = which; rest && p_.filters; rest &= rest - 1) {
      const int i = __builtin_ctz(rest);
      which &= ~(static_cast<unsigned>(!filter_.passes(task.query, part.first + row + i)) << i);
    }
    if (which) {
      uint32_t rows[kLanes];
      const int64_t first = p_.rows_before(part.segment) + part.start + part.first + row;
      for (int i = 0; i < kLanes; ++i) {
        rows[i] = static_cast<uint32_t>(first + i);
      }
      found.take(task.query, high, high - width, rows, which);
      raise(m, found);
    }
  }

  const Problem& p_;
  const RowQueries& queries_;
  int64_t groups_; // of four dimensions
  int64_t section_; // panels at a time
  RowPanels<Code> panels_;
  std::vector<int32_t> codes_; // (groups, kQueries) of four codes each
  const Task* tasks_ = nullptr;
  RowFilter filter_{}; // counts queries from the block's first and rows from the list's
  // Of each query.
  float first_scale_[kTogether], last_scale_[kTogether], sum_[kTogether], error_[kTogether], far_[kTogether],
      base_[kTogether], slack_[kTogether], needed_[kTogether];
  int32_t start_[kQueries];
};

} // namespace torch_ivf_module
