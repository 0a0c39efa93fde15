// The first pass over codes: rows whose optimistic bound exceeds a query's threshold become candidates.
#pragma once

#include "candidates.h"
#include "code_tiles.h"
#include "schedule.h"

namespace torch_ivf_module {

constexpr int64_t kAheadPanels = 2; // requested before they are needed, where few queries read a list

// Some queries of a list, coded relative to its centre.
struct CodedQueries {
  QueryBounds bounds;
  const Task* tasks = nullptr;
  RowFilter filter{}; // counts queries from the block's first and rows from the list's
  std::vector<float> values; // (kQueries, d) residuals, of whole vectors
  std::vector<int32_t> codes; // (d / 4, kQueries) of four codes each
};

class CodeScanner {
 public:
  // `x` (Q, d) are queries as exact scores take them.
  CodeScanner(const Problem& p, const float* x, const Codes& codes, bool differences)
      : p_(p), x_(x), codes_(codes), differences_(differences), padded_((p.d + kLanes - 1) / kLanes * kLanes) {
    queries_.values.resize(kQueries * padded_);
    queries_.codes.resize(Panel::groups(p.d) * kQueries);
    bytes_.resize(padded_);
  }

  void scan(const Visit& visit, int64_t query, Candidates& found) {
    queries_.filter = p_.filter(query, p_.segments[visit.segment], visit.start);
    if (visit.segment > 0) {
      return score_rows(p_, visit, visit.tasks, visit.count, queries_.filter, found); // which have no codes
    }
    const int64_t size = p_.segments[0].sizes[visit.list], panels = codes_.first[p_.lists];
    const int64_t begin = codes_.first[visit.list], end = codes_.first[visit.list + 1];
    if (begin < 0 || begin > panels || end > panels || end - begin != panels_of(size)) {
      throw std::runtime_error("codes must be of the lists");
    }
    for (int64_t t = 0; t < visit.count;) {
      const int64_t left = visit.count - t;
      const int64_t some = left < kQueries || left >= 2 * kQueries ? std::min<int64_t>(left, kQueries) : (left + 1) / 2;
      set_queries(visit, query, visit.tasks + t, static_cast<int>(some), found);
      with_count<kQueries>(static_cast<int>(some), [&](auto m) { scan_panels<m>(visit, found); });
      t += some;
    }
  }

 private:
  void set_queries(const Visit& visit, int64_t query, const Task* tasks, int count, Candidates& found) {
    const float* centre = codes_.centres + visit.list * p_.d;
    QueryBounds& bounds = queries_.bounds;
    queries_.tasks = tasks;
    for (int m = 0; m < count && count > 1; ++m) {
      prefetch(x_ + (query + tasks[m].query) * p_.d);
    }
    for (int m = 0; m < count; ++m) {
      const float* x = x_ + (query + tasks[m].query) * p_.d;
      const Residual r = residual(x, differences_ ? centre : nullptr, p_.d, &queries_.values[m * padded_]);
      bounds.most[m] = r.most;
      bounds.squares[m] = r.squares;
      bounds.threshold[m] = found.threshold(tasks[m].query);
      bounds.centre_score[m] = differences_ ? 0.0f : exact_score<false>(x, centre, p_.d);
    }
    bounds.set_scales(kQueryLevels);
    for (int m = 0; m < count; ++m) {
      const float* values = &queries_.values[m * padded_];
      const Quantised lost = quantise(values, p_.d, bounds.scale[m], bounds.inverse[m], bytes_.data());
      bounds.lost[m] = lost.squares;
      bounds.sum[m] = lost.sum;
      write_query_codes(bytes_.data(), Panel::groups(p_.d), queries_.codes.data() + m);
    }
    bounds.set(codes_.limits + 3 * visit.list, p_.d, differences_);
    for (int m = 0; m < count; ++m) {
      if (!bounds.bounded[m]) {
        score_rows(p_, visit, tasks + m, 1, queries_.filter, found);
      }
    }
  }

  void prefetch(const float* x) const {
    for (int64_t i = 0; i < p_.d; i += 16) {
      __builtin_prefetch(x + i);
    }
  }

  template <int M>
  void scan_panels(const Visit& visit, Candidates& found) {
    float lowest = std::numeric_limits<float>::infinity(), highest = -lowest;
    for (int m = 0; m < M; ++m) {
      lowest = std::min(lowest, queries_.bounds.lowest_norm[m]);
      highest = std::max(highest, queries_.bounds.highest_norm[m]);
    }
    const int64_t size = panel_bytes(p_.d), base = codes_.first[visit.list], end = panels_of(visit.last);
    const int64_t next = visit.next < 0 ? base : codes_.first[visit.next];
    for (int64_t i = visit.first / kCodedRows; i < end; ++i) {
      const float* norms = codes_.norms + 2 * (base + i);
      if (norms[1] < lowest || norms[0] > highest) {
        continue;
      }
      const Panel panel{codes_.panels + (base + i) * size};
      const int64_t soon = i + kAheadPanels < end ? base + i + kAheadPanels : next + i + kAheadPanels - end;
      const int64_t ahead = (soon - base - i) * size;
      const int64_t run = i * kCodedRows / kRun * kRun; // its first row
      for (int64_t row = 0; row < kCodedRows; row += kTileRows) {
        scan_rows<M>(panel, row, ahead, visit, run, found);
      }
    }
  }

  // Rows [row, row + kTileRows) of a panel.
  template <int M>
  __attribute__((noinline)) void scan_rows(
      Panel panel, int64_t row, int64_t ahead, const Visit& visit, int64_t run, Candidates& found) {
    const QueryBounds& query = queries_.bounds;
    Vec scales[kCodeVectors], halves[kCodeVectors];
    scan_tile<M, 1>(
        panel.codes() + 4 * row, queries_.codes.data(), query.start, query.needed, Panel::groups(p_.d), ahead,
        [&] {
          UNROLLED for (int v = 0; v < kCodeVectors; ++v) {
            scales[v] = Vec::loadu(panel.scales() + row + v * kLanes);
            halves[v] = Vec::loadu(panel.halves() + row + v * kLanes);
          }
          return [&](int m, int v, Vec products, Vec) {
            return fmadd(products, scales[v], fmadd(halves[v], Vec(query.slope[m]), Vec(0.0f)));
          };
        },
        [&](int m, int v, Vec bound, unsigned which) {
          offer(m, bound, scales[v], halves[v], panel.rows() + row + v * kLanes, which, visit, run, found);
        });
  }

  __attribute__((noinline)) void offer(
      int m, Vec bound, Vec scale, Vec half, const uint16_t* in_run, unsigned which, const Visit& visit, int64_t run,
      Candidates& found) {
    QueryBounds& bounds = queries_.bounds;
    const Task& task = queries_.tasks[m];
    const Segment& segment = p_.segments[0];
    const auto first = static_cast<uint32_t>(visit.start), last = static_cast<uint32_t>(segment.sizes[visit.list] - 1);
    uint32_t rows[kLanes];
    for (int i = 0; i < kLanes; ++i) { // no row outside of the list is read, whatever the codes are
      rows[i] = first + std::min(static_cast<uint32_t>(run) + in_run[i], last);
    }
    for (unsigned rest = which; rest && (segment.bias || p_.limits || p_.filters); rest &= rest - 1) {
      const int i = __builtin_ctz(rest);
      const bool masked = segment.bias && segment.bias[rows[i]] == kNever;
      const int64_t row = static_cast<int64_t>(rows[i]) - visit.start;
      if (masked || row >= task.limit || !queries_.filter.passes(task.query, row)) {
        which &= ~(1u << i);
      }
    }
    if (which) {
      const Vec high = fmadd(bound, Vec(bounds.scale[m]), Vec(bounds.base[m]));
      const Vec width =
          fmadd(scale, Vec(bounds.width_scale[m]), fmadd(half, Vec(bounds.width_half[m]), Vec(bounds.width[m])));
      found.take(task.query, high, high - width, rows, which);
      bounds.raise(m, found.threshold(task.query));
    }
  }

  const Problem& p_;
  const float* x_;
  const Codes& codes_;
  bool differences_;
  int64_t padded_;
  CodedQueries queries_;
  std::vector<int8_t> bytes_;
};

} // namespace torch_ivf_module
