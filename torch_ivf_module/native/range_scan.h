// All rows above a threshold, for range search.
//
// Q queries, H hits.
#pragma once

#include <numeric>

#include "range_hits.h"
#include "scan.h"
#include "scan_float.h"

namespace torch_ivf_module {

// Rows with a ranking score above the query's threshold (Q,), query by query: lims (Q + 1,), and the rows (H,) into the
// memory that rows_of(H) returns. The order of a query's rows does not depend on the threads.
template <typename T>
void scan_above(
    const Problem& p, const float* threshold, int64_t* lims, const std::function<int64_t*(int64_t)>& rows_of) {
  Block block;
  block.plan(p, 0, p.queries);
  const int64_t items = static_cast<int64_t>(block.items.size());
  std::vector<RangeHits> found(items, RangeHits(threshold));
  const int64_t team = team_for(block.nanoseconds(), p.within.threads);
  std::vector<FloatScanner<T>> scanners(team, FloatScanner<T>(p));
  parallel_items(items, team, [&](int64_t item, int64_t member) {
    scanners[member].scan(block.visit(p, item), 0, found[item]);
  });
  std::fill(lims, lims + p.queries + 1, 0);
  int64_t* end = lims + 1; // of each query's rows; first their number
  for (const RangeHits& part : found) {
    for (const Hit& hit : part.hits()) {
      ++end[hit.query];
    }
  }
  std::partial_sum(end, end + p.queries, end);
  std::vector<int64_t> next(lims, lims + p.queries + 1);
  int64_t* out = rows_of(next.back());
  for (const RangeHits& part : found) {
    for (const Hit& hit : part.hits()) {
      out[next[hit.query]++] = hit.row;
    }
  }
}

} // namespace torch_ivf_module
