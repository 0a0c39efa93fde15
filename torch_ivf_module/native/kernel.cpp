// The functions torch.ops.torch_ivf_module.*: what they take, checked, and their schemas.
//
// Q queries, L lists, P probes, N vectors, d dim, k results, K candidates a query.

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <c10/util/Exception.h>
#include <torch/library.h>

#include "hits.h"
#include "scan_float.h"
#include "scan_rounded.h"
#include "tasks.h"

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

// The arguments that both scans take, checked.
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

template <typename Make>
std::tuple<at::Tensor, at::Tensor> scanned(const Problem& p, const at::Tensor& x, int64_t max_bytes, const Make& make) {
  at::Tensor scores = at::empty({p.queries, p.k}, x.options());
  at::Tensor rows = at::empty({p.queries, p.k}, x.options().dtype(at::kLong));
  scan_all(p, make, max_bytes, scores.mutable_data_ptr<float>(), rows.mutable_data_ptr<int64_t>());
  return {scores, rows};
}

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
  return with_rows(packed, [&](const auto* rows) {
    return scanned(p, x, max_bytes, [&] { return FloatScanner(p, rows); });
  });
}

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
  return with_rows(packed, [&](const auto* rows) {
    return scanned(p, x, max_bytes, [&] { return RoundedScanner(p, rows, differences); });
  });
}

// Threads share out the rows; what each finds is put end to end.
std::tuple<at::Tensor, at::Tensor> scan_above(
    const at::Tensor& x,
    const at::Tensor& packed,
    const at::Tensor& bias,
    const at::Tensor& offsets,
    const at::Tensor& sizes,
    const at::Tensor& probed,
    const at::Tensor& floor) {
  const Problem p = problem_of(x, packed, bias, offsets, sizes, probed, std::nullopt, 1);
  check(floor, "floor", 1, at::kFloat);
  TORCH_CHECK(floor.size(0) == p.queries, "floor must have an entry for each query");
  const int64_t shares = at::get_num_threads();
  const Tasks tasks = tasks_of(p, 0, p.queries, 0, p.probes);
  const std::vector<int64_t> cuts = cuts_of(p, tasks, shares);
  std::vector<Hits> hits(shares, Hits(floor.const_data_ptr<float>()));
  with_rows(packed, [&](const auto* from) {
    on_threads(shares, [&](int64_t share) {
      FloatScanner scanner(p, from);
      scan_tasks(p, tasks, cuts[share], cuts[share + 1], hits[share], scanner);
    });
  });
  int64_t count = 0;
  for (const Hits& part : hits) {
    count += part.count();
  }
  at::Tensor queries = at::empty({count}, probed.options()), rows = at::empty({count}, probed.options());
  int64_t at = 0;
  for (const Hits& part : hits) {
    part.write(queries.mutable_data_ptr<int64_t>() + at, rows.mutable_data_ptr<int64_t>() + at);
    at += part.count();
  }
  return {queries, rows};
}

// The score of one row that users see: of differences, or of products.
template <bool Differences>
float exact_score(const float* x, const float* row, int64_t d) {
  Vec sums[2] = {Vec(0.0f), Vec(0.0f)};
  int64_t i = 0;
  const auto add = [&](Vec& sum) {
    const Vec query = Vec::loadu(x + i), value = Vec::loadu(row + i);
    if constexpr (Differences) {
      const Vec apart = query - value;
      sum = at::vec::fmadd(apart, apart, sum);
    } else {
      sum = at::vec::fmadd(query, value, sum);
    }
    i += kLanes;
  };
  while (i + 2 * kLanes <= d) {
    add(sums[0]);
    add(sums[1]);
  }
  if (i + kLanes <= d) {
    add(sums[0]);
  }
  float sum = sum_of(sums[0] + sums[1]);
  for (; i < d; ++i) {
    sum += Differences ? (x[i] - row[i]) * (x[i] - row[i]) : x[i] * row[i];
  }
  return Differences ? -sum : sum;
}

at::Tensor exact_scores(const at::Tensor& x, const at::Tensor& packed, const at::Tensor& rows, bool differences) {
  check(x, "x", 2, at::kFloat);
  check(packed, "packed", 2, packed.scalar_type());
  check(rows, "rows", 2, at::kLong);
  TORCH_CHECK(x.size(1) == packed.size(1), "x has ", x.size(1), " columns, packed has ", packed.size(1));
  TORCH_CHECK(rows.size(0) == x.size(0), "rows must have a row for each query");
  const int64_t* wanted = rows.const_data_ptr<int64_t>();
  const bool there = std::all_of(wanted, wanted + rows.numel(), [&](int64_t row) { return row < packed.size(0); });
  TORCH_CHECK(there, "rows must be below ", packed.size(0));
  const int64_t d = x.size(1), count = rows.size(1);
  at::Tensor scores = at::empty(rows.sizes(), x.options());
  const float* queries = x.const_data_ptr<float>();
  const int64_t* row = rows.const_data_ptr<int64_t>();
  float* out = scores.mutable_data_ptr<float>();
  with_rows(packed, [&](const auto* from) {
    constexpr int64_t kLine = 64 / sizeof(*from);
    at::parallel_for(0, x.size(0), 16, [&](int64_t first, int64_t last) {
      std::vector<float> scratch(d);
      for (int64_t i = first * count; i < last * count; ++i) {
        // The rows lie anywhere: ask for the second next one while this one is looked at.
        if (i + 2 < last * count && row[i + 2] >= 0) {
          for (int64_t j = 0; j < d; j += kLine) {
            __builtin_prefetch(from + row[i + 2] * d + j);
          }
        }
        if (row[i] < 0) {
          out[i] = kNever;
          continue;
        }
        const float* query = queries + i / count * d;
        const float* vector = as_float(from + row[i] * d, d, scratch.data());
        out[i] = differences ? exact_score<true>(query, vector, d) : exact_score<false>(query, vector, d);
      }
    });
  });
  return scores;
}

TORCH_LIBRARY(torch_ivf_module, library) {
  library.def(
      "scan(Tensor x, Tensor packed, Tensor bias, Tensor offsets, Tensor sizes, Tensor probed, Tensor? limits, "
      "int k, int max_bytes) -> (Tensor, Tensor)");
  library.def(
      "scan_bounds(Tensor x, Tensor packed, Tensor bias, Tensor offsets, Tensor sizes, Tensor probed, Tensor? limits, "
      "int k, int max_bytes, bool differences) -> (Tensor, Tensor)");
  library.def(
      "scan_above(Tensor x, Tensor packed, Tensor bias, Tensor offsets, Tensor sizes, Tensor probed, Tensor floor) "
      "-> (Tensor, Tensor)");
  library.def("has_bfloat16_units() -> bool", [] { return at::native::cpublas::could_pack(at::kBFloat16); });
  library.def("exact_scores(Tensor x, Tensor packed, Tensor rows, bool differences) -> Tensor");
}

TORCH_LIBRARY_IMPL(torch_ivf_module, CPU, library) {
  library.impl("scan", &scan);
  library.impl("scan_bounds", &scan_bounds);
  library.impl("scan_above", &scan_above);
  library.impl("exact_scores", &exact_scores);
}

} // namespace
} // namespace torch_ivf_module
