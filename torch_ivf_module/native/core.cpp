// Searches on plain pointers. Compiled once for each instruction set, as core_TORCH_IVF_ISA.
//
// Q queries, L lists, P probes, N vectors, d dim, k results, K candidates a query, H hits.

#include <numeric>

#include "certify.h"
#include "range_hits.h"
#include "scan_float.h"
#include "schedule.h"

namespace torch_ivf_module {
namespace {

// Queries that one thread re-scores at a time.
constexpr int64_t kRescored = 16;

template <typename Call>
void with_rows(const Rows& rows, const Call& call) {
  switch (rows.dtype) {
    case Rows::kFloat32:
      return call(static_cast<const float*>(rows.data));
    case Rows::kFloat16:
      return call(static_cast<const Half*>(rows.data));
    case Rows::kBFloat16:
      return call(static_cast<const BFloat16*>(rows.data));
  }
}

// The k best rows by ranking score, relative to the origin where it is given.
template <typename T>
void rank(
    const Problem& p, const T* packed, const float* origin, const float* offsets, int64_t max_bytes, float* scores,
    int64_t* rows) {
  const auto best = [&](int64_t, int64_t count) { return TopK(count, p.k); };
  scan_all(p, [&] { return FloatScanner(p, packed, origin, offsets); }, best, max_bytes, scores, rows);
}

// Exact scores of a query's candidates (count): the k best, best first, padded with kNever and -1.
template <typename T>
void rescore(
    const float* x, const T* packed, const int64_t* candidates, int64_t count, int64_t d, bool differences, int64_t k,
    std::vector<float>& scratch, std::vector<uint64_t>& keys, float* scores, int64_t* rows) {
  constexpr int64_t kLine = 64 / sizeof(T);
  float* row = take(scratch, d);
  keys.clear();
  for (int64_t i = 0; i < count && candidates[i] >= 0; ++i) {
    // The rows lie anywhere: request the second next one while this one is scored.
    if (i + 2 < count && candidates[i + 2] >= 0) {
      for (int64_t j = 0; j < d; j += kLine) {
        __builtin_prefetch(packed + candidates[i + 2] * d + j);
      }
    }
    const float score = exact_score(differences, x, as_float(packed + candidates[i] * d, d, row), d);
    if (std::isfinite(score)) {
      keys.push_back(as_key(score, static_cast<uint32_t>(candidates[i])));
    }
  }
  const int64_t found = std::min<int64_t>(k, keys.size());
  std::partial_sort(keys.begin(), keys.begin() + found, keys.end(), std::greater<>());
  for (int64_t i = 0; i < k; ++i) {
    scores[i] = i < found ? score_of(keys[i]) : kNever;
    rows[i] = i < found ? static_cast<int64_t>(row_of(keys[i])) : -1;
  }
}

// One more pass for queries whose candidates prove nothing: results (Q, k) of those queries are replaced.
template <typename T>
void retry(
    const Problem& p, const float* x, const T* packed, bool differences, const std::vector<int64_t>& queries,
    const std::vector<float>& needed, int64_t max_bytes, float* scores, int64_t* rows) {
  std::vector<int64_t> bounded, unbounded;
  for (int64_t q : queries) {
    (needed[q] == kNever ? unbounded : bounded).push_back(q);
  }
  const Subset some(p, x, bounded, needed);
  std::vector<float> found_scores(bounded.size() * p.k);
  std::vector<int64_t> found_rows(bounded.size() * p.k);
  const auto exact = [&](int64_t first, int64_t count) {
    return ExactTopK<T>(
        count, p.k, some.plain.data() + first * p.d, some.thresholds.data() + first, packed, p.d, differences);
  };
  const auto scanner = [&] { return FloatScanner(some.problem, packed); };
  scan_all(some.problem, scanner, exact, max_bytes, found_scores.data(), found_rows.data());
  for (size_t i = 0; i < bounded.size(); ++i) {
    std::copy_n(&found_scores[i * p.k], p.k, scores + bounded[i] * p.k);
    std::copy_n(&found_rows[i * p.k], p.k, rows + bounded[i] * p.k);
  }
  parallel_items(static_cast<int64_t>(unbounded.size()), [&](int64_t i) {
    const int64_t q = unbounded[i];
    ExactTopK<T> best(1, p.k, x + q * p.d, &needed[q], packed, p.d, differences);
    score_every_row(p, q, best);
    best.write(0, scores + q * p.k, rows + q * p.k);
  });
}

template <typename T>
void search_rows(
    const Problem& of_x, const T* packed, const float* origin, int64_t kept, bool differences, int64_t max_bytes,
    Best out, bool* again) {
  const int64_t d = of_x.d, k = of_x.k;
  Problem p = of_x;
  p.k = kept;
  std::vector<float> shifted, with_origin, needed(p.queries, kNever);
  std::vector<QueryNorms> norms;
  if (differences) {
    const double origin_norm = norm(origin, d);
    shifted.resize(p.queries * d);
    for (int64_t q = 0; q < p.queries; ++q) {
      for (int64_t i = 0; i < d; ++i) {
        shifted[q * d + i] = of_x.x[q * d + i] - origin[i];
      }
      norms.emplace_back(&shifted[q * d], origin, origin_norm, d);
      with_origin.push_back(static_cast<float>(norms.back().offset));
    }
    p.x = shifted.data();
  }
  std::vector<float> ranks(p.queries * kept);
  std::vector<int64_t> candidates(p.queries * kept);
  const float* relative = differences ? origin : nullptr;
  rank(p, packed, relative, differences ? with_origin.data() : nullptr, max_bytes, ranks.data(), candidates.data());
  parallel_items((p.queries + kRescored - 1) / kRescored, [&](int64_t block) {
    std::vector<float> scratch;
    std::vector<uint64_t> keys;
    for (int64_t q = block * kRescored; q < std::min(p.queries, (block + 1) * kRescored); ++q) {
      rescore(
          of_x.x + q * d, packed, &candidates[q * kept], kept, d, differences, k, scratch, keys, out.scores + q * k,
          out.rows + q * k);
      const float lowest = ranks[q * kept + kept - 1], kth = out.scores[q * k + k - 1];
      const bool left_out = lowest > kNever; // rows that the scan ranked and did not keep
      if (differences) {
        const bool reached = left_out && lowest >= needed_ranking(norms[q], kth, d, true);
        again[q] = reached || overflows(norms[q].size, norms[q].origin_norm);
      } else {
        again[q] = std::isinf(lowest) && left_out;
      }
    }
  });
  std::vector<int64_t> second;
  for (int64_t q = 0; differences && q < p.queries; ++q) {
    if (again[q]) { // panels of the second pass hold vectors as they are, for exact scores
      second.push_back(q);
      needed[q] = needed_ranking(norms[q], out.scores[q * k + k - 1], d, false);
    }
  }
  if (!second.empty()) {
    p.k = k;
    retry(p, of_x.x, packed, differences, second, needed, max_bytes, out.scores, out.rows);
  }
}

void search_lists(
    const Problem& p, const Rows& rows, const float* origin, int64_t kept, bool differences, int64_t max_bytes,
    Best out, bool* again) {
  with_rows(rows, [&](const auto* packed) {
    search_rows(p, packed, origin, kept, differences, max_bytes, out, again);
  });
}

void scan(const Problem& p, const Rows& rows, int64_t max_bytes, Best out) {
  with_rows(rows, [&](const auto* packed) { rank(p, packed, nullptr, nullptr, max_bytes, out.scores, out.rows); });
}

// Threads divide the rows.
void scan_above(
    const Problem& p, const Rows& rows, const float* threshold, int64_t* lims,
    const std::function<int64_t*(int64_t)>& rows_of) {
  const int64_t shares = num_threads();
  const Tasks tasks = tasks_of(p, 0, p.queries, 0, p.probes);
  const std::vector<int64_t> cuts = cuts_of(p, tasks, shares);
  std::vector<RangeHits> found(shares, RangeHits(threshold));
  with_rows(rows, [&](const auto* packed) {
    parallel_items(shares, [&](int64_t share) {
      FloatScanner scanner(p, packed);
      scan_tasks(p, tasks, cuts[share], cuts[share + 1], found[share], scanner);
    });
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

} // namespace

#define TEXT_OF(name) #name
#define QUOTED(name) TEXT_OF(name)
#define JOINED(one, other) one##other
#define CORE_OF(isa) JOINED(core_, isa)

extern const Core CORE_OF(TORCH_IVF_ISA);
const Core CORE_OF(TORCH_IVF_ISA) = {QUOTED(TORCH_IVF_ISA), scan, search_lists, scan_above};

} // namespace torch_ivf_module
