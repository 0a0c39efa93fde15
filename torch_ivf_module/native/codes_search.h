// The k best rows of the probed lists by codes: those that the codes do not rule out are scored exactly.
#pragma once

#include "scan.h"
#include "scan_codes.h"
#include "scan_rows.h"

namespace torch_ivf_module {

// Bytes for the queries that are searched at a time, so that they and their candidates stay in the caches. But there are
// at least as many queries as it takes for each thread to multiply kBlockTasks of them with a list.
inline int64_t codes_bytes(const Problem& p) {
  constexpr int64_t kThreadBytes = 12 << 20;
  const int64_t queries = kBlockTasks * p.within.threads * p.lists / std::max<int64_t>(1, p.probes);
  const int64_t wanted = queries * scan_bytes(p, Candidates::kBytes * Candidates::room(p.k));
  return std::min(p.within.max_bytes, std::max(wanted, kThreadBytes * p.within.threads));
}

// `x` (Q, d) are finite queries, `p` complete but for its x; `scanner(p)` makes a scanner for one thread. `scored` (Q,) are
// rows that were scored exactly.
template <typename MakeScanner>
void search_by_bounds(
    Problem p, const float* x, bool differences, const MakeScanner& scanner, Best out, int64_t* scored) {
  constexpr double kFinishNanoseconds = 60; // an estimate, of a result
  p.coded = true;
  p.within.max_bytes = codes_bytes(p);
  const RowScorer scorer(p, differences);
  scan_all(
      p, Candidates::kBytes * Candidates::room(p.k), [&] { return scanner(p); },
      [&](int64_t first, int64_t count, Thresholds& thresholds) {
        return Candidates(count, p.d, p.k, x + first * p.d, scorer, thresholds);
      },
      p.k * (kFinishNanoseconds + p.d / kWorkPerNanosecond),
      [&](int64_t query, Candidates* found, int64_t number, int64_t) {
        float* scores = out.scores + query * p.k;
        int64_t* rows = out.rows + query * p.k;
        if (found) {
          const int64_t end = std::min(number + kFinishQueries, found->queries());
          for (int64_t next = number; number % kFinishQueries == 0 && next < end; ++next) {
            found->prefetch(next);
          }
          scored[query] = found->write(number, scores, rows);
        } else {
          std::fill_n(scores, p.k, kNever);
          std::fill_n(rows, p.k, int64_t{-1});
          scored[query] = 0;
        }
      });
}

// Search float rows that have a copy in codes.
inline void search_codes(
    const Problem& p, const float* x, const Codes& codes, bool differences, Best out, int64_t* scored) {
  const auto scanner = [&](const Problem& problem) { return CodeScanner(problem, x, codes, differences); };
  search_by_bounds(p, x, differences, scanner, out, scored);
}

// Search rows that are stored as codes. Biases are relative to `origin` (d), which is null if scores are products.
inline void search_coded_rows(const Problem& p, const float* x, const float* origin, Best out, int64_t* scored) {
  const RowQueries queries(p, x, origin);
  const auto search = [&](auto code) {
    const auto scanner = [&](const Problem& problem) { return RowScanner<decltype(code)>(problem, queries); };
    search_by_bounds(p, x, origin != nullptr, scanner, out, scored);
  };
  p.dtype == Dtype::kCode8 ? search(Code8()) : search(Code4());
}

} // namespace torch_ivf_module
