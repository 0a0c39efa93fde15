// The operators torch.ops.torch_ivf_module.*: checks of their arguments, and their schemas.
//
// Q queries, L lists, P probes, N vectors, d dim, k results, K candidates a query, H hits.

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/sub.h>
#include <ATen/ops/zeros.h>
#include <c10/util/Exception.h>
#include <torch/library.h>

#include <numeric>

#include "certify.h"
#include "range_hits.h"
#include "scan_codes.h"
#include "scan_float.h"
#include "schedule.h"

namespace torch_ivf_module {
namespace {

void check(const at::Tensor& tensor, const char* name, int64_t dim, at::ScalarType dtype) {
  TORCH_CHECK(tensor.device().is_cpu(), name, " must be on the CPU, got ", tensor.device());
  TORCH_CHECK(tensor.dim() == dim, name, " must have ", dim, " dimensions, got ", tensor.dim());
  TORCH_CHECK(tensor.scalar_type() == dtype, name, " must be ", dtype, ", got ", tensor.scalar_type());
  TORCH_CHECK(tensor.is_contiguous(), name, " must be contiguous");
}

template <typename Call>
auto with_rows(const at::Tensor& packed, const Call& call) {
  switch (packed.scalar_type()) {
    case at::kFloat:
      return call(packed.const_data_ptr<float>());
    case at::kHalf:
      return call(packed.const_data_ptr<at::Half>());
    case at::kBFloat16:
      return call(packed.const_data_ptr<at::BFloat16>());
    default:
      TORCH_CHECK(false, "packed must be float32, float16 or bfloat16, got ", packed.scalar_type());
  }
}

// The arguments that all scans take, checked.
Problem problem_of(
    const at::Tensor& x,
    const at::Tensor& packed,
    const at::Tensor& bias,
    const at::Tensor& offsets,
    const at::Tensor& sizes,
    const at::Tensor& probed,
    const std::optional<at::Tensor>& limits,
    int64_t k) {
  check(x, "x", 2, at::kFloat);
  check(packed, "packed", 2, packed.scalar_type());
  check(bias, "bias", 1, at::kFloat);
  check(offsets, "offsets", 1, at::kLong);
  check(sizes, "sizes", 1, at::kLong);
  check(probed, "probed", 2, at::kLong);
  TORCH_CHECK(x.size(1) == packed.size(1), "x has ", x.size(1), " columns, packed has ", packed.size(1));
  TORCH_CHECK(bias.size(0) == 0 || bias.size(0) == packed.size(0), "bias must be empty or of one entry a row");
  TORCH_CHECK(sizes.size(0) == offsets.size(0) && sizes.size(0) > 0, "offsets and sizes must be of equal length");
  TORCH_CHECK(probed.size(0) == x.size(0), "probed must have a row for each query");
  TORCH_CHECK(packed.size(0) < (int64_t(1) << 31), "packed must have less than 2^31 rows, got ", packed.size(0));
  TORCH_CHECK(k > 0, "k must be >= 1, got ", k);
  TORCH_CHECK(x.size(1) > 0, "x must have columns");
  TORCH_CHECK(x.size(0) < (int64_t(1) << 31), "x must have less than 2^31 rows, got ", x.size(0));
  const int64_t* offset = offsets.const_data_ptr<int64_t>();
  const int64_t* size = sizes.const_data_ptr<int64_t>();
  for (int64_t l = 0; l < sizes.size(0); ++l) {
    const bool inside = offset[l] >= 0 && size[l] >= 0 && size[l] <= packed.size(0) && offset[l] <= packed.size(0) - size[l];
    TORCH_CHECK(inside, "list ", l, " must lie in packed, got rows ", offset[l], " and ", size[l], " more");
  }
  const int64_t* list = probed.const_data_ptr<int64_t>();
  const bool known = std::all_of(list, list + probed.numel(), [](int64_t l) { return l >= 0; });
  TORCH_CHECK(known, "probed must have no list below 0");
  if (limits) {
    check(*limits, "limits", 2, at::kLong);
    TORCH_CHECK(limits->sizes() == probed.sizes(), "limits must have the shape of probed");
  }
  return {
      x.const_data_ptr<float>(),
      bias.size(0) ? bias.const_data_ptr<float>() : nullptr,
      offsets.const_data_ptr<int64_t>(),
      sizes.const_data_ptr<int64_t>(),
      probed.const_data_ptr<int64_t>(),
      limits ? limits->const_data_ptr<int64_t>() : nullptr,
      x.size(0),
      sizes.size(0) - 1,
      probed.size(1),
      x.size(1),
      k};
}

std::tuple<at::Tensor, at::Tensor> empty_results(const Problem& p, const at::Tensor& x) {
  return {at::empty({p.queries, p.k}, x.options()), at::empty({p.queries, p.k}, x.options().dtype(at::kLong))};
}

// The k best rows by ranking score, relative to the origin where it is given; or by upper bounds of exact scores.
template <typename T>
void rank(
    const Problem& p, const T* packed, const float* origin, const float* offsets, int64_t max_bytes, float* scores,
    int64_t* rows) {
  const auto best = [&](int64_t, int64_t count) { return TopK(count, p.k); };
  scan_all(p, [&] { return FloatScanner(p, packed, origin, offsets); }, best, max_bytes, scores, rows);
}

template <typename T>
void rank_by_bounds(
    const Problem& p, const T* packed, bool differences, int64_t max_bytes, float* scores, int64_t* rows) {
  const auto best = [&](int64_t, int64_t count) { return TopK(count, p.k); };
  scan_all(p, [&] { return CodeScanner(p, packed, differences); }, best, max_bytes, scores, rows);
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
  on_threads(static_cast<int64_t>(unbounded.size()), [&](int64_t i) {
    const int64_t q = unbounded[i];
    ExactTopK<T> best(1, p.k, x + q * p.d, &needed[q], packed, p.d, differences);
    score_every_row(p, q, best);
    best.write(0, scores + q * p.k, rows + q * p.k);
  });
}

// The k best rows of the probed lists by exact score, which do not depend on rounding in the scan: scores and rows
// (Q, k), and which queries (Q,) took a second pass, or have products that overflow. `kept` candidates are ranked, by
// upper bounds if `coded`.
std::tuple<at::Tensor, at::Tensor, at::Tensor> search_lists(
    const at::Tensor& x,
    const at::Tensor& origin,
    const at::Tensor& packed,
    const at::Tensor& bias,
    const at::Tensor& offsets,
    const at::Tensor& sizes,
    const at::Tensor& probed,
    const std::optional<at::Tensor>& limits,
    int64_t k,
    int64_t kept,
    bool differences,
    bool coded,
    int64_t max_bytes) {
  TORCH_CHECK(kept >= k && k > 0, "kept must be >= k >= 1, got ", kept, " and ", k);
  check(x, "x", 2, at::kFloat);
  check(origin, "origin", 1, at::kFloat);
  TORCH_CHECK(origin.size(0) == x.size(1), "origin must have the columns of x");
  const at::Tensor shifted = differences ? at::sub(x, origin) : x;
  Problem p = problem_of(shifted, packed, bias, offsets, sizes, probed, limits, kept);
  Problem of_x = p; // codes are differences from points among the rows, not from the origin
  of_x.x = x.const_data_ptr<float>();
  auto [ranking, candidates] = empty_results(p, x);
  p.k = k;
  auto [scores, rows] = empty_results(p, x);
  p.k = kept;
  const float* o = origin.const_data_ptr<float>();
  std::vector<QueryNorms> norms;
  std::vector<float> with_origin, needed(p.queries, kNever);
  const double origin_norm = norm(o, p.d);
  for (int64_t q = 0; differences && q < p.queries; ++q) {
    norms.emplace_back(p.x + q * p.d, o, origin_norm, p.d);
    with_origin.push_back(static_cast<float>(norms.back().offset));
  }
  at::Tensor again = at::zeros({p.queries}, x.options().dtype(at::kBool));
  bool* doubtful = again.mutable_data_ptr<bool>();
  std::vector<int64_t> second;
  with_rows(packed, [&](const auto* vectors) {
    float* best = scores.template mutable_data_ptr<float>();
    int64_t* found = rows.template mutable_data_ptr<int64_t>();
    float* ranks = ranking.template mutable_data_ptr<float>();
    int64_t* kept_rows = candidates.template mutable_data_ptr<int64_t>();
    if (coded) {
      rank_by_bounds(of_x, vectors, differences, max_bytes, ranks, kept_rows);
    } else {
      const float* relative = differences ? o : nullptr;
      rank(p, vectors, relative, differences ? with_origin.data() : nullptr, max_bytes, ranks, kept_rows);
    }
    at::parallel_for(0, p.queries, 16, [&](int64_t first, int64_t last) {
      std::vector<float> scratch;
      std::vector<uint64_t> keys;
      for (int64_t q = first; q < last; ++q) {
        rescore(
            of_x.x + q * p.d, vectors, kept_rows + q * kept, kept, p.d, differences, k, scratch, keys, best + q * k,
            found + q * k);
        const float lowest = ranks[q * kept + kept - 1], kth = best[q * k + k - 1];
        const bool left_out = lowest > kNever; // rows that the scan ranked and did not keep
        if (coded) {
          doubtful[q] = left_out && !(lowest < kth);
        } else if (differences) {
          const bool reached = left_out && lowest >= needed_ranking(norms[q], kth, p.d, true);
          doubtful[q] = reached || overflows(norms[q].size, norms[q].origin_norm);
        } else {
          doubtful[q] = std::isinf(lowest) && left_out;
        }
      }
    });
    for (int64_t q = 0; q < p.queries; ++q) {
      if (doubtful[q] && (coded || differences)) {
        second.push_back(q);
        if (differences) { // panels of the second pass hold vectors as they are, for exact scores
          needed[q] = needed_ranking(norms[q], best[q * k + k - 1], p.d, false);
        }
      }
    }
    if (!second.empty()) {
      p.k = k;
      retry(p, of_x.x, vectors, differences, second, needed, max_bytes, best, found);
    }
  });
  return {scores, rows, again};
}

// The k best rows of the probed lists by ranking score: scores and rows (Q, k).
std::tuple<at::Tensor, at::Tensor> scan(
    const at::Tensor& x,
    const at::Tensor& packed,
    const at::Tensor& bias,
    const at::Tensor& offsets,
    const at::Tensor& sizes,
    const at::Tensor& probed,
    const std::optional<at::Tensor>& limits,
    int64_t k,
    int64_t max_bytes) {
  const Problem p = problem_of(x, packed, bias, offsets, sizes, probed, limits, k);
  auto [scores, rows] = empty_results(p, x);
  with_rows(packed, [&](const auto* vectors) {
    rank(
        p, vectors, nullptr, nullptr, max_bytes, scores.template mutable_data_ptr<float>(),
        rows.template mutable_data_ptr<int64_t>());
  });
  return {scores, rows};
}

// The same by upper bounds of exact scores; the last is +inf for a query that the bounds do not serve. Searches call it
// through search_lists; it is an operator of its own so that tests can hold the bounds against exact scores.
std::tuple<at::Tensor, at::Tensor> scan_bounds(
    const at::Tensor& x,
    const at::Tensor& packed,
    const at::Tensor& bias,
    const at::Tensor& offsets,
    const at::Tensor& sizes,
    const at::Tensor& probed,
    const std::optional<at::Tensor>& limits,
    int64_t k,
    int64_t max_bytes,
    bool differences) {
  const Problem p = problem_of(x, packed, bias, offsets, sizes, probed, limits, k);
  auto [scores, rows] = empty_results(p, x);
  with_rows(packed, [&](const auto* vectors) {
    rank_by_bounds(
        p, vectors, differences, max_bytes, scores.template mutable_data_ptr<float>(),
        rows.template mutable_data_ptr<int64_t>());
  });
  return {scores, rows};
}

// The rows of the probed lists with a ranking score above the query's threshold (Q,): lims (Q + 1,) and rows (H,), query
// by query. Threads divide the rows.
std::tuple<at::Tensor, at::Tensor> scan_above(
    const at::Tensor& x,
    const at::Tensor& packed,
    const at::Tensor& bias,
    const at::Tensor& offsets,
    const at::Tensor& sizes,
    const at::Tensor& probed,
    const at::Tensor& threshold) {
  const Problem p = problem_of(x, packed, bias, offsets, sizes, probed, std::nullopt, 1);
  check(threshold, "threshold", 1, at::kFloat);
  TORCH_CHECK(threshold.size(0) == p.queries, "threshold must have an entry for each query");
  const int64_t shares = at::get_num_threads();
  const Tasks tasks = tasks_of(p, 0, p.queries, 0, p.probes);
  const std::vector<int64_t> cuts = cuts_of(p, tasks, shares);
  std::vector<RangeHits> found(shares, RangeHits(threshold.const_data_ptr<float>()));
  with_rows(packed, [&](const auto* from) {
    on_threads(shares, [&](int64_t share) {
      FloatScanner scanner(p, from);
      scan_tasks(p, tasks, cuts[share], cuts[share + 1], found[share], scanner);
    });
  });
  at::Tensor lims = at::zeros({p.queries + 1}, probed.options());
  int64_t* end = lims.mutable_data_ptr<int64_t>() + 1; // of each query's rows; first their number
  for (const RangeHits& part : found) {
    for (const Hit& hit : part.hits()) {
      ++end[hit.query];
    }
  }
  std::partial_sum(end, end + p.queries, end);
  std::vector<int64_t> next(end - 1, end + p.queries);
  at::Tensor rows = at::empty({next.back()}, probed.options());
  int64_t* out = rows.mutable_data_ptr<int64_t>();
  for (const RangeHits& part : found) {
    for (const Hit& hit : part.hits()) {
      out[next[hit.query]++] = hit.row;
    }
  }
  return {lims, rows};
}

TORCH_LIBRARY(torch_ivf_module, library) {
  library.def(
      "scan(Tensor x, Tensor packed, Tensor bias, Tensor offsets, Tensor sizes, Tensor probed, Tensor? limits, "
      "int k, int max_bytes) -> (Tensor, Tensor)");
  library.def(
      "scan_bounds(Tensor x, Tensor packed, Tensor bias, Tensor offsets, Tensor sizes, Tensor probed, Tensor? limits, "
      "int k, int max_bytes, bool differences) -> (Tensor, Tensor)");
  library.def(
      "scan_above(Tensor x, Tensor packed, Tensor bias, Tensor offsets, Tensor sizes, Tensor probed, Tensor threshold) "
      "-> (Tensor, Tensor)");
  library.def(
      "search_lists(Tensor x, Tensor origin, Tensor packed, Tensor bias, Tensor offsets, Tensor sizes, Tensor probed, "
      "Tensor? limits, int k, int kept, bool differences, bool coded, int max_bytes) -> (Tensor, Tensor, Tensor)");
  library.def("has_bfloat16_units() -> bool", [] { return at::native::cpublas::could_pack(at::kBFloat16); });
}

TORCH_LIBRARY_IMPL(torch_ivf_module, CPU, library) {
  library.impl("search_lists", &search_lists);
  library.impl("scan", &scan);
  library.impl("scan_bounds", &scan_bounds);
  library.impl("scan_above", &scan_above);
}

} // namespace
} // namespace torch_ivf_module
