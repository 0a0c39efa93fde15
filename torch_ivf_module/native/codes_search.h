// The k best rows of the probed lists, where the packed rows of the first segment have codes: those that the codes do not
// rule out are scored exactly.
#pragma once

#include "scan.h"
#include "scan_codes.h"

namespace torch_ivf_module {

// `x` (Q, d) are finite queries, `p` complete but for its x. `scored` (Q,) are rows that were scored exactly.
inline void search_codes(
    Problem p, const float* x, const Codes& codes, bool differences, Best out, int64_t* scored) {
  constexpr double kFinishNanoseconds = 60; // an estimate, of a result
  p.coded = true;
  const RowScorer scorer(p, differences);
  scan_all(
      p, Candidates::kBytes * Candidates::room(p.k), [&] { return CodeScanner(p, x, codes, differences); },
      [&](int64_t first, int64_t count, Thresholds& thresholds) {
        return Candidates(count, p.d, p.k, x + first * p.d, scorer, thresholds);
      },
      p.k * (kFinishNanoseconds + p.d / kWorkPerNanosecond),
      [&](int64_t query, Candidates* found, int64_t number, int64_t) {
        float* scores = out.scores + query * p.k;
        int64_t* rows = out.rows + query * p.k;
        if (found) {
          scored[query] = found->write(number, scores, rows);
        } else {
          std::fill_n(scores, p.k, kNever);
          std::fill_n(rows, p.k, int64_t{-1});
          scored[query] = 0;
        }
      });
}

} // namespace torch_ivf_module
