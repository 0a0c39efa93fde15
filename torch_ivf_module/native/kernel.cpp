// The operators torch.ops.torch_ivf_module.*: checks of their arguments, and their schemas. By torch's stable ABI alone, so
// that one binary serves every version of torch from 2.10 on.
//
// Q queries, L lists, P probes, N vectors, d dim, k results, K candidates a query, H hits.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <optional>
#include <sstream>
#include <stdexcept>
#include <tuple>

#include "isa.h"

namespace torch_ivf_module {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

template <typename... Parts>
void check_that(bool holds, const Parts&... parts) {
  if (!holds) {
    std::ostringstream text;
    (text << ... << parts);
    throw std::runtime_error(text.str());
  }
}

void check(const Tensor& tensor, const char* name, int64_t dim, ScalarType dtype) {
  check_that(tensor.is_cpu(), name, " must be on the CPU");
  check_that(tensor.dim() == dim, name, " must have ", dim, " dimensions, got ", tensor.dim());
  check_that(tensor.scalar_type() == dtype, name, " must be ", dtype, ", got ", tensor.scalar_type());
  check_that(tensor.is_contiguous(), name, " must be contiguous");
}

template <typename T>
const T* data(const Tensor& tensor) {
  return static_cast<const T*>(tensor.const_data_ptr());
}

// A new tensor of the CPU.
Tensor empty(std::initializer_list<int64_t> shape, int32_t dtype) {
  int64_t strides[2] = {shape.size() > 1 ? shape.begin()[1] : 1, 1};
  AtenTensorHandle handle;
  const auto dim = static_cast<int64_t>(shape.size());
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(
      dim, shape.begin(), strides, dtype, aoti_torch_device_type_cpu(), 0, &handle));
  return Tensor(handle);
}

Rows rows_of(const Tensor& packed) {
  check(packed, "packed", 2, packed.scalar_type());
  switch (packed.scalar_type()) {
    case ScalarType::Float:
      return {Rows::kFloat32, packed.const_data_ptr()};
    case ScalarType::Half:
      return {Rows::kFloat16, packed.const_data_ptr()};
    case ScalarType::BFloat16:
      return {Rows::kBFloat16, packed.const_data_ptr()};
    default:
      check_that(false, "packed must be float32, float16 or bfloat16, got ", packed.scalar_type());
      return {};
  }
}

// The arguments that all scans take, checked.
Problem problem_of(
    const Tensor& x,
    const Tensor& packed,
    const Tensor& bias,
    const Tensor& offsets,
    const Tensor& sizes,
    const Tensor& probed,
    const std::optional<Tensor>& limits,
    int64_t k) {
  check(x, "x", 2, ScalarType::Float);
  check(packed, "packed", 2, packed.scalar_type());
  check(bias, "bias", 1, ScalarType::Float);
  check(offsets, "offsets", 1, ScalarType::Long);
  check(sizes, "sizes", 1, ScalarType::Long);
  check(probed, "probed", 2, ScalarType::Long);
  const int64_t queries = x.size(0), d = x.size(1), n = packed.size(0);
  check_that(d == packed.size(1), "x has ", d, " columns, packed has ", packed.size(1));
  check_that(bias.size(0) == 0 || bias.size(0) == n, "bias must be empty or of one entry a row");
  check_that(sizes.size(0) == offsets.size(0) && sizes.size(0) > 0, "offsets and sizes must be of equal length");
  check_that(probed.size(0) == queries, "probed must have a row for each query");
  check_that(n < (int64_t(1) << 31), "packed must have less than 2^31 rows, got ", n);
  check_that(k > 0, "k must be >= 1, got ", k);
  check_that(d > 0, "x must have columns");
  check_that(queries < (int64_t(1) << 31), "x must have less than 2^31 rows, got ", queries);
  const int64_t* offset = data<int64_t>(offsets);
  const int64_t* size = data<int64_t>(sizes);
  for (int64_t l = 0; l < sizes.size(0); ++l) {
    const bool inside = offset[l] >= 0 && size[l] >= 0 && size[l] <= n && offset[l] <= n - size[l];
    check_that(inside, "list ", l, " must lie in packed, got rows ", offset[l], " and ", size[l], " more");
  }
  const int64_t* list = data<int64_t>(probed);
  const bool known = std::all_of(list, list + probed.numel(), [](int64_t l) { return l >= 0; });
  check_that(known, "probed must have no list below 0");
  if (limits) {
    check(*limits, "limits", 2, ScalarType::Long);
    const bool alike = limits->size(0) == queries && limits->size(1) == probed.size(1);
    check_that(alike, "limits must have the shape of probed");
  }
  return {
      data<float>(x),
      bias.size(0) ? data<float>(bias) : nullptr,
      offset,
      size,
      list,
      limits ? data<int64_t>(*limits) : nullptr,
      queries,
      sizes.size(0) - 1,
      probed.size(1),
      d,
      k};
}

// Scores and rows (Q, k), to be filled.
struct Results {
  Tensor scores, rows;

  explicit Results(const Problem& p)
      : scores(empty({p.queries, p.k}, aoti_torch_dtype_float32())),
        rows(empty({p.queries, p.k}, aoti_torch_dtype_int64())) {}

  Best best() const {
    return {static_cast<float*>(scores.mutable_data_ptr()), static_cast<int64_t*>(rows.mutable_data_ptr())};
  }
};

// The k best rows of the probed lists by exact score: scores and rows (Q, k), and which queries (Q,) took a second pass,
// or have products that overflow.
std::tuple<Tensor, Tensor, Tensor> search_lists(
    const Tensor& x,
    const Tensor& origin,
    const Tensor& packed,
    const Tensor& bias,
    const Tensor& offsets,
    const Tensor& sizes,
    const Tensor& probed,
    const std::optional<Tensor>& limits,
    int64_t k,
    int64_t kept,
    bool differences,
    int64_t max_bytes) {
  check_that(kept >= k && k > 0, "kept must be >= k >= 1, got ", kept, " and ", k);
  const Problem p = problem_of(x, packed, bias, offsets, sizes, probed, limits, k);
  check(origin, "origin", 1, ScalarType::Float);
  check_that(origin.size(0) == p.d, "origin must have the columns of x");
  const Results results(p);
  const Tensor again = empty({p.queries}, aoti_torch_dtype_bool());
  core().search_lists(
      p, rows_of(packed), data<float>(origin), kept, differences, max_bytes, results.best(),
      static_cast<bool*>(again.mutable_data_ptr()));
  return {results.scores, results.rows, again};
}

// The k best rows of the probed lists by ranking score: scores and rows (Q, k).
std::tuple<Tensor, Tensor> scan(
    const Tensor& x,
    const Tensor& packed,
    const Tensor& bias,
    const Tensor& offsets,
    const Tensor& sizes,
    const Tensor& probed,
    const std::optional<Tensor>& limits,
    int64_t k,
    int64_t max_bytes) {
  const Problem p = problem_of(x, packed, bias, offsets, sizes, probed, limits, k);
  const Results results(p);
  core().scan(p, rows_of(packed), max_bytes, results.best());
  return {results.scores, results.rows};
}

// The rows of the probed lists with a ranking score above the query's threshold (Q,): lims (Q + 1,) and rows (H,), query
// by query.
std::tuple<Tensor, Tensor> scan_above(
    const Tensor& x,
    const Tensor& packed,
    const Tensor& bias,
    const Tensor& offsets,
    const Tensor& sizes,
    const Tensor& probed,
    const Tensor& threshold) {
  const Problem p = problem_of(x, packed, bias, offsets, sizes, probed, std::nullopt, 1);
  check(threshold, "threshold", 1, ScalarType::Float);
  check_that(threshold.size(0) == p.queries, "threshold must have an entry for each query");
  const Tensor lims = empty({p.queries + 1}, aoti_torch_dtype_int64());
  std::optional<Tensor> rows;
  const auto rows_of_hits = [&](int64_t hits) {
    rows = empty({hits}, aoti_torch_dtype_int64());
    return static_cast<int64_t*>(rows->mutable_data_ptr());
  };
  core().scan_above(
      p, rows_of(packed), data<float>(threshold), static_cast<int64_t*>(lims.mutable_data_ptr()), rows_of_hits);
  return {lims, *rows};
}

std::string isa() {
  return core().isa;
}

STABLE_TORCH_LIBRARY(torch_ivf_module, library) {
  library.def("isa() -> str");
  library.def(
      "scan(Tensor x, Tensor packed, Tensor bias, Tensor offsets, Tensor sizes, Tensor probed, Tensor? limits, "
      "int k, int max_bytes) -> (Tensor, Tensor)");
  library.def(
      "scan_above(Tensor x, Tensor packed, Tensor bias, Tensor offsets, Tensor sizes, Tensor probed, Tensor threshold) "
      "-> (Tensor, Tensor)");
  library.def(
      "search_lists(Tensor x, Tensor origin, Tensor packed, Tensor bias, Tensor offsets, Tensor sizes, Tensor probed, "
      "Tensor? limits, int k, int kept, bool differences, int max_bytes) -> (Tensor, Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(torch_ivf_module, CompositeExplicitAutograd, library) {
  library.impl("isa", TORCH_BOX(&isa));
}

STABLE_TORCH_LIBRARY_IMPL(torch_ivf_module, CPU, library) {
  library.impl("search_lists", TORCH_BOX(&search_lists));
  library.impl("scan", TORCH_BOX(&scan));
  library.impl("scan_above", TORCH_BOX(&scan_above));
}

} // namespace
} // namespace torch_ivf_module
