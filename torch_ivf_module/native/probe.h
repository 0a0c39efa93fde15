// Which lists a query reads: a certified search among the centroids, and what a cap on rows leaves of them.
//
// Q queries, L lists, P probes, d dim.
#pragma once

#include <limits>

#include "certified_search.h"

namespace torch_ivf_module {

// Queries up to which centroids are read as codes: of few, reading the centroids takes most of the time. For 2,048 queries,
// 32 lists each of 512, all searches by codes took 9% longer, for 128 queries and 8 lists 16%.
constexpr int64_t kCodedQueries = 16;
// Norms of vectors whose products are far from overflowing.
constexpr float kLargestCoded = 0x1p40f;

// The nearest lists of one query in float64, where no square of a float32 number overflows: exact scores and lists (P,).
inline void nearest_in_float64(
    const Coarse& coarse, const float* x, int64_t d, int64_t probes, bool differences, float* scores, int64_t* lists) {
  std::vector<std::pair<double, int64_t>> all(coarse.lists);
  for (int64_t l = 0; l < coarse.lists; ++l) {
    double sum = 0;
    for (int64_t i = 0; i < d; ++i) {
      const double value = coarse.centroids[l * d + i], apart = x[i] - value;
      sum += differences ? -apart * apart : x[i] * value;
    }
    all[l] = {-sum, l}; // the best first
  }
  std::partial_sort(all.begin(), all.begin() + probes, all.end());
  for (int64_t i = 0; i < probes; ++i) {
    scores[i] = static_cast<float>(-all[i].first);
    lists[i] = all[i].second;
  }
}

// The nearest lists of finite queries x (Q, d), nearest first: exact scores and lists (Q, P), P at most L. As `probe` of
// functional/probe.py.
inline void nearest_lists(
    const Coarse& coarse, const float* x, int64_t queries, int64_t d, int64_t probes, bool differences, Limits within,
    Best out) {
  float* const scores = out.scores;
  int64_t* const lists = out.rows;
  if (coarse.lists == 1) {
    std::fill_n(scores, queries * probes, 0.0f);
    std::fill_n(lists, queries * probes, int64_t{0});
    return;
  }
  const int64_t offsets[2] = {0, coarse.lists}, sizes[2] = {coarse.lists, 0};
  const std::vector<int64_t> all_of_them(queries, 0);
  Problem p{};
  p.segments[0] = {coarse.centroids, coarse.bias, offsets, sizes, nullptr, coarse.lists};
  p.segment_count = 1;
  p.probed = all_of_them.data();
  p.queries = queries;
  p.lists = p.probes = 1;
  p.d = d;
  p.row_bytes = row_bytes<float>(d);
  p.within = within;
  std::vector<int64_t> unclear; // distances or products that overflow
  const float* limits = queries <= kCodedQueries && coarse.codes.panels ? coarse.codes.limits : nullptr;
  if (limits && limits[0] < kLargestCoded && limits[2] < kLargestCoded) { // false for NaN too
    p.k = probes;
    p.dtype = Dtype::kFloat32;
    std::vector<int64_t> scored(queries);
    coarse.search_codes(p, x, coarse.codes, differences, out, scored.data());
    for (int64_t q = 0; q < queries; ++q) {
      const float square = exact_score<false>(x + q * d, x + q * d, d);
      if (lists[(q + 1) * probes - 1] < 0 || !(square < kLargestCoded * kLargestCoded)) {
        unclear.push_back(q);
      }
    }
  } else {
    const std::unique_ptr<bool[]> again(new bool[queries]);
    const int64_t kept = std::min(probes + 1 + probes / 4, coarse.lists + 1);
    CertifiedSearch<float>(p, x, coarse.origin, differences, probes, kept, out, again.get()).run();
    for (int64_t q = 0; q < queries; ++q) {
      if (lists[(q + 1) * probes - 1] < 0 || (!differences && again[q])) {
        unclear.push_back(q);
      }
    }
  }
  const double work = 1.0 * coarse.lists * d * unclear.size();
  parallel_items(unclear.size(), team_for(work, within.threads), [&](int64_t i, int64_t) {
    const int64_t at = unclear[i] * probes;
    nearest_in_float64(coarse, x + unclear[i] * d, d, probes, differences, scores + at, lists + at);
  });
}

// Leave out, of the lists (P,) of a query, nearest first, those from which on the rows of all segments together pass
// `max_codes`; the nearest is always read. Left out is list number L.
inline void cap_rows(const Problem& p, int64_t max_codes, int64_t* lists) {
  int64_t total = 0;
  for (int64_t j = 0; j < p.probes; ++j) {
    for (int segment = 0; segment < p.segment_count; ++segment) {
      total += p.segments[segment].sizes[lists[j]];
    }
    if (j > 0 && total > max_codes) {
      lists[j] = p.lists;
    }
  }
}

} // namespace torch_ivf_module
