// Which candidates prove the exact answer, and the second pass for queries whose candidates do not.
//
// A scan ranks rows by a rounded score and keeps the best. Their exact scores tell the k-th; a row that was not kept can
// be a result only if its ranking score reaches a threshold that follows from the k-th exact score and the rounding
// errors. Where the lowest kept ranking score is below that threshold, the kept rows prove the answer. Otherwise one more
// pass over the same lists scores exactly every row whose ranking score reaches the threshold.
//
// Q queries, P probes, d dim, k results. functional/metric.py has the same rule in PyTorch operations.
#pragma once

#include <cmath>
#include <vector>

#include "microkernels.h"

namespace torch_ivf_module {

// Bounds of the error of a float32 sum of d products in the microkernels, relative to the product of the norms: half a
// unit in the last place for each addition of a chain, each chunk and each addition across a register, and 24 for the
// rounding of the factors and the bias. The first is for panels, the second for products along a row.
inline double panel_rounding(int64_t d) {
  const int64_t chain = d <= 2 * kPanelChunk ? d : kPanelChunk + d / kPanelChunk;
  return 0x1p-24 * static_cast<double>(chain + 24);
}

inline double row_rounding(int64_t d) {
  return 0x1p-24 * static_cast<double>(std::min(d, kRowChunk) / kLanes + d / kRowChunk + kLanes + 24);
}

constexpr double kAskNanoseconds = 3; // an estimate, of asking whether a row passes a filter

inline double norm(const float* values, int64_t d) {
  double squares = 0;
  for (int64_t i = 0; i < d; ++i) {
    squares += static_cast<double>(values[i]) * values[i];
  }
  return std::sqrt(squares);
}

// Whether ranking scores may overflow float32 for a query at distance `size` from the origin: a row whose squared distance
// is finite lies within 2^64 of it.
inline bool overflows(double size, double origin_norm) {
  return !(size * (size + 0x1p64 + origin_norm) < 0x1p126);
}

// A query, of norm `size` relative to the origin, whose product with the origin is `offset`.
struct QueryNorms {
  double size = 0, offset = 0, origin_norm = 0;

  QueryNorms() = default;

  QueryNorms(const float* y, const float* origin, double origin_norm, int64_t d)
      : origin_norm(origin_norm) {
    for (int64_t i = 0; i < d; ++i) {
      size += static_cast<double>(y[i]) * y[i];
      offset += static_cast<double>(y[i]) * origin[i];
    }
    size = std::sqrt(size);
  }
};

// A bound of the rounding error of the ranking score of a row, whose distance from the origin is at most `reach` and whose
// squared distance from the query is below `distance`. `roundings` says how the score was computed, `relative` whether
// panels are relative to the origin.
inline double score_error(
    const QueryNorms& q, double distance, double reach, int64_t d, bool relative, uint8_t roundings) {
  const double far = q.size * (reach + q.origin_norm) + reach * reach; // the norm of the row is at most reach + |o|
  const double error = row_rounding(d) * distance + 0x1p-22 * (q.size * q.size + std::fabs(q.offset));
  double product = 0;
  if (roundings & kAlongRows) {
    product = std::max(product, row_rounding(d) * far);
  }
  if (roundings & kByPanels) {
    product = std::max(product, panel_rounding(d) * (relative ? q.size * reach + reach * reach : far));
  }
  // The second term is for denormal numbers, whose rounding errors are absolute.
  return std::max(error, product) + 0x1p-126 * static_cast<double>(d + 4);
}

// The ranking score that a row reaches if its exact score, a negated squared distance, exceeds `kth`: where panels are
// relative to the origin, or where no vector is. -inf where nothing can be said, so that every row counts.
inline float needed_ranking(const QueryNorms& q, double kth, int64_t d, bool relative, uint8_t roundings) {
  const double distance = -kth;
  if (overflows(q.size, q.origin_norm) || !std::isfinite(distance)) {
    return kNever;
  }
  const double error = score_error(q, distance, q.size + std::sqrt(distance), d, relative, roundings);
  const double needed = (q.size * q.size - distance) / 2 + (relative ? 0 : q.offset);
  return std::nextafter(static_cast<float>(needed - error), kNever);
}

// The k best rows by exact score among those offered with a ranking score above the threshold of their query.
template <typename T>
class ExactTopK {
 public:
  static constexpr bool kExact = true;

  ExactTopK(
      int64_t queries,
      const Problem& p,
      const float* x, // (queries, d) as exact scores take them
      const float* needed, // (queries,) ranking scores, -inf unless exact scores are of differences
      bool differences,
      Thresholds& thresholds) // of exact scores
      : best_(queries, p.k, thresholds), p_(p), x_(x), needed_(needed), differences_(differences), row_(p.d) {}

  void note(int64_t, Rounding) {}

  float threshold(int64_t query) const {
    return needed_[query];
  }

  void offer(int64_t query, float ranking, uint32_t row) {
    if (ranking > needed_[query]) {
      score(query, row);
    }
  }

  // The exact scores, of differences, of the rows of a panel (d, kPanel) as they are stored. Where rows are equal many of
  // a panel are wanted.
  void score_panel(int64_t query, const float* panel, float* scores) const {
    const float* x = x_ + query * p_.d;
    Vec total[2] = {Vec(0.0f), Vec(0.0f)};
    for (int64_t begin = 0; begin < p_.d; begin += kPanelChunk) {
      Vec sum[2] = {Vec(0.0f), Vec(0.0f)};
      for (int64_t i = begin; i < std::min(p_.d, begin + kPanelChunk); ++i) {
        const Vec low = Vec(x[i]) - Vec::loadu(panel + i * kPanel);
        const Vec high = Vec(x[i]) - Vec::loadu(panel + i * kPanel + kLanes);
        sum[0] = fmadd(low, low, sum[0]);
        sum[1] = fmadd(high, high, sum[1]);
      }
      total[0] = total[0] + sum[0];
      total[1] = total[1] + sum[1];
    }
    (Vec(0.0f) - total[0]).store(scores);
    (Vec(0.0f) - total[1]).store(scores + kLanes);
  }

  void take(int64_t query, float exact, uint32_t row) {
    best_.offer(query, exact, row);
  }

  // Take a row into account whatever its ranking score is.
  void score(int64_t query, uint32_t row) {
    const float* vector = as_float(p_.row<T>(row), 1, p_.d, row_.data());
    best_.offer(query, exact_score(differences_, x_ + query * p_.d, vector, p_.d), row);
  }

  void merge(int64_t query, const ExactTopK& other) {
    best_.merge(query, other.best_);
  }

  // The sums of a panel have another order: the k best get the scores that every other search gives them.
  void write(int64_t query, float* scores, int64_t* rows) {
    best_.write(query, scores, rows);
    std::vector<float> vector(p_.d);
    std::vector<uint64_t> keys;
    for (int64_t i = 0; i < p_.k && rows[i] >= 0; ++i) {
      const float* at = as_float(p_.row<T>(rows[i]), 1, p_.d, vector.data());
      keys.push_back(as_key(exact_score(differences_, x_ + query * p_.d, at, p_.d), static_cast<uint32_t>(rows[i])));
    }
    std::sort(keys.begin(), keys.end(), std::greater<>());
    for (size_t i = 0; i < keys.size(); ++i) {
      scores[i] = score_of(keys[i]);
      rows[i] = static_cast<int64_t>(row_of(keys[i]));
    }
  }

 private:
  TopK best_;
  const Problem& p_;
  const float* x_;
  const float* needed_;
  bool differences_;
  std::vector<float> row_;
};

// Offer every row of a query's lists that a filter has not excluded, whatever its ranking score.
template <typename T>
void score_every_row(const Problem& p, int64_t query, ExactTopK<T>& best) {
  Block block;
  block.plan(p, query, query + 1);
  for (const Group& group : block.groups) {
    const Segment& segment = p.segments[group.segment];
    const int64_t first = segment.offsets[group.list], before = p.rows_before(group.segment);
    for (int64_t row = first; row < first + block.tasks[group.first].limit; ++row) {
      if ((!segment.bias || segment.bias[row] != kNever) && p.filter(query, segment, row).passes(0, 0)) {
        best.score(0, static_cast<uint32_t>(before + row));
      }
    }
  }
}

// Whether so few rows pass the filters that asking for each row first, and then scoring those that pass, takes less time
// than to scan: by a sample of queries and rows.
inline bool few_pass(const Problem& p) {
  constexpr int64_t kQuerySample = 64, kRowSample = 64, kFewPass = 12;
  const Segment& segment = p.segments[0];
  int64_t asked = 0, passed = 0;
  for (int64_t query = 0; query < p.queries; query += std::max<int64_t>(1, p.queries / kQuerySample)) {
    for (int64_t row = 0; row < segment.rows; row += std::max<int64_t>(1, segment.rows / kRowSample)) {
      ++asked;
      passed += p.filter(query, segment, row).passes(0, 0);
    }
  }
  return passed * kFewPass < asked;
}

// Offer the rows of a list that pass, of its first `limit`. All are asked before any is scored, so that the processor
// waits for few of the answers. Returns how many pass.
template <typename T>
int64_t score_passing(const Problem& p, const Filter& filter, const Group& group, int64_t limit, ExactTopK<T>& best) {
  constexpr int64_t kAsked = 1024, kPrefetched = 4;
  const Segment& segment = p.segments[group.segment];
  const int64_t first = segment.offsets[group.list], before = p.rows_before(group.segment);
  int64_t rows[kAsked], scored = 0;
  for (int64_t start = first; start < first + limit; start += kAsked) {
    int64_t count = 0;
    for (int64_t row = start; row < std::min(start + kAsked, first + limit); ++row) {
      rows[count] = row;
      count += filter.in_masks(segment.ids[row]);
    }
    for (int64_t i = 0; i < count; ++i) {
      const int64_t soon = before + rows[std::min(i + kPrefetched, count - 1)];
      for (int64_t j = 0; j < p.row_bytes; j += 64) {
        __builtin_prefetch(p.row<char>(soon) + j);
      }
      if ((!segment.bias || segment.bias[rows[i]] != kNever) && filter.in_lists(segment.ids[rows[i]])) {
        best.score(0, static_cast<uint32_t>(before + rows[i]));
        ++scored;
      }
    }
  }
  return scored;
}

// The k best of the rows that pass the filters, each of which is scored exactly, and how many they are, (Q,).
template <typename T>
void score_passing_rows(const Problem& p, const float* x, bool differences, Best out, int64_t* scored) {
  const std::vector<float> needed(p.queries, kNever);
  const double rows = static_cast<double>(p.queries) * p.probes * p.segments[0].rows / std::max<int64_t>(1, p.lists);
  parallel_items(p.queries, team_for(kAskNanoseconds * rows, p.within.threads), [&](int64_t q, int64_t) {
    Thresholds thresholds(1);
    ExactTopK<T> best(1, p, x + q * p.d, &needed[q], differences, thresholds);
    Block block;
    block.plan(p, q, q + 1);
    scored[q] = 0;
    for (const Group& group : block.groups) {
      scored[q] += score_passing(p, p.filters[q], group, block.tasks[group.first].limit, best);
    }
    best.write(0, out.scores + q * p.k, out.rows + q * p.k);
  });
}

// A copy of some queries of a problem: rows of x (Q, d), probed and limits (Q, P).
struct Subset {
  std::vector<float> x, plain, thresholds;
  std::vector<int64_t> probed, limits;
  std::vector<Filter> filters;
  Problem problem;

  Subset(const Problem& p, const float* plain_x, const std::vector<int64_t>& queries, const std::vector<float>& needed) {
    for (int64_t q : queries) {
      x.insert(x.end(), p.x + q * p.d, p.x + (q + 1) * p.d);
      plain.insert(plain.end(), plain_x + q * p.d, plain_x + (q + 1) * p.d);
      probed.insert(probed.end(), p.probed + q * p.probes, p.probed + (q + 1) * p.probes);
      if (p.limits) {
        limits.insert(limits.end(), p.limits + q * p.probes, p.limits + (q + 1) * p.probes);
      }
      if (p.filters) {
        filters.push_back(p.filters[q]);
      }
      thresholds.push_back(needed[q]);
    }
    problem = p;
    problem.x = x.data();
    problem.probed = probed.data();
    problem.limits = p.limits ? limits.data() : nullptr;
    problem.filters = p.filters ? filters.data() : nullptr;
    problem.queries = static_cast<int64_t>(queries.size());
  }
};

} // namespace torch_ivf_module
