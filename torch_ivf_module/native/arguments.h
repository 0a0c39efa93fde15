// Checks the arguments of the operators and converts them for the cores. Uses torch's stable ABI only.
//
// Q queries, L lists, P probes, N vectors, d dim, k results.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <optional>
#include <sstream>
#include <stdexcept>
#include <vector>

#include "rows.h"

namespace torch_ivf_module {

constexpr int64_t kMost = int64_t{1} << 31; // rows of a tensor, which are counted in 32 bits

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

template <typename... Parts>
inline void check_that(bool holds, const Parts&... parts) {
  if (!holds) {
    std::ostringstream text;
    (text << ... << parts);
    throw std::runtime_error(text.str());
  }
}

inline void check(const Tensor& tensor, const char* name, int64_t dim, ScalarType dtype) {
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
inline Tensor empty(std::initializer_list<int64_t> shape, int32_t dtype) {
  int64_t strides[2] = {shape.size() > 1 ? shape.begin()[1] : 1, 1};
  AtenTensorHandle handle;
  const auto dim = static_cast<int64_t>(shape.size());
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(
      dim, shape.begin(), strides, dtype, aoti_torch_device_type_cpu(), 0, &handle));
  return Tensor(handle);
}

template <typename T>
T* results(const Tensor& tensor) {
  return static_cast<T*>(tensor.mutable_data_ptr());
}

// The type of stored rows (N, W) of dimension d.
inline Dtype dtype_of(const Tensor& packed, int64_t d) {
  const int64_t width = packed.size(1);
  const ScalarType type = packed.scalar_type();
  if (type == ScalarType::Byte) {
    const bool eight = width == row_bytes<Code8>(d);
    check_that(eight || width == row_bytes<Code4>(d), "x has ", d, " columns, packed has codes of ", width, " bytes a row");
    return eight ? Dtype::kCode8 : Dtype::kCode4;
  }
  check_that(d == width, "x has ", d, " columns, packed has ", width);
  const bool halves = type == ScalarType::Half || type == ScalarType::BFloat16;
  check_that(halves || type == ScalarType::Float, "packed must be float32, float16, bfloat16 or uint8, got ", type);
  return !halves ? Dtype::kFloat32 : type == ScalarType::Half ? Dtype::kFloat16 : Dtype::kBFloat16;
}

inline int64_t thread_count() {
  uint32_t threads = 1;
  TORCH_ERROR_CODE_CHECK(torch_get_num_threads(&threads));
  return std::max<int64_t>(1, threads);
}

// Queries of a problem without lists.
inline Problem problem_of(const Tensor& x, int64_t k, int64_t max_bytes) {
  check(x, "x", 2, ScalarType::Float);
  Problem p{};
  p.x = data<float>(x);
  p.queries = x.size(0);
  p.d = x.size(1);
  p.k = k;
  p.within = {thread_count(), max_bytes};
  check_that(p.d > 0, "x must have columns");
  check_that(p.queries < kMost, "x must have less than 2^31 rows, got ", p.queries);
  check_that(k > 0, "k must be >= 1, got ", k);
  return p;
}

inline void add_segment(
    Problem& p, const Tensor& packed, const Tensor& bias, const Tensor& offsets, const Tensor& sizes,
    const Tensor* ids) {
  check(packed, "packed", 2, packed.scalar_type());
  check(bias, "bias", 1, ScalarType::Float);
  check(offsets, "offsets", 1, ScalarType::Long);
  check(sizes, "sizes", 1, ScalarType::Long);
  const int64_t n = packed.size(0), lists = sizes.size(0) - 1;
  check_that(bias.size(0) == 0 || bias.size(0) == n, "bias must be empty or of one entry a row");
  check_that(sizes.size(0) == offsets.size(0) && lists >= 0, "offsets and sizes must be of equal length");
  check_that(n < kMost, "packed must have less than 2^31 rows, got ", n);
  const Dtype dtype = dtype_of(packed, p.d);
  if (p.segment_count) {
    check_that(lists == p.lists && dtype == p.dtype, "segments must have the same lists and dtype");
  }
  if (ids) {
    check(*ids, "ids", 1, ScalarType::Long);
    check_that(ids->size(0) == n, "ids must have an entry for each row");
  }
  p.lists = lists;
  p.dtype = dtype;
  p.row_bytes = packed.size(1) * (dtype == Dtype::kFloat32 ? 4 : packed.scalar_type() == ScalarType::Byte ? 1 : 2);
  p.segments[p.segment_count++] = {
      packed.const_data_ptr(),
      bias.size(0) ? data<float>(bias) : nullptr,
      data<int64_t>(offsets),
      data<int64_t>(sizes),
      ids ? data<int64_t>(*ids) : nullptr,
      n};
}

inline void set_probed(Problem& p, const Tensor& probed, const std::optional<Tensor>& limits) {
  check(probed, "probed", 2, ScalarType::Long);
  check_that(probed.size(0) == p.queries, "probed must have a row for each query");
  p.probed = data<int64_t>(probed);
  p.probes = probed.size(1);
  if (limits) {
    check(*limits, "limits", 2, ScalarType::Long);
    const bool alike = limits->size(0) == p.queries && limits->size(1) == p.probes;
    check_that(alike, "limits must have the shape of probed");
    p.limits = data<int64_t>(*limits);
  }
}

// The ascending ids of several filters, from three tensors: where each begins and ends (F,) in ids (T,), and ids.
inline std::vector<IdRange> id_ranges(const std::vector<Tensor>& lists, const char* name) {
  check_that(lists.size() == 3, name, " must be 3 tensors, got ", lists.size());
  for (const Tensor& part : lists) {
    check(part, name, 1, ScalarType::Long);
  }
  const int64_t *first = data<int64_t>(lists[0]), *last = data<int64_t>(lists[1]), *ids = data<int64_t>(lists[2]);
  check_that(lists[0].size(0) == lists[1].size(0), name, " must have as many ends as beginnings");
  std::vector<IdRange> ranges;
  for (int64_t i = 0; i < lists[0].size(0); ++i) {
    const bool inside = 0 <= first[i] && first[i] <= last[i] && last[i] <= lists[2].size(0);
    check_that(inside, name, " must begin and end within their ids, got ", first[i], " to ", last[i]);
    ranges.push_back({ids + first[i], ids + last[i]});
  }
  return ranges;
}

// The filter of each query: `numbers` (Q,) are positions in each part that is there, masks (F, n) and ranges (F,).
inline std::vector<Filter> filters_of(
    const Problem& p, const Tensor& numbers, const std::optional<Tensor>& mask,
    const std::optional<std::vector<Tensor>>& allowed, const std::optional<std::vector<Tensor>>& excluded) {
  static constexpr bool kNoId = false; // stands for a mask without entries, which may have no memory
  check(numbers, "filter", 1, ScalarType::Long);
  check_that(numbers.size(0) == p.queries, "filter must have an entry for each query");
  if (mask) {
    check(*mask, "mask", 2, ScalarType::Bool);
  }
  const auto may = allowed ? id_ranges(*allowed, "allowed") : std::vector<IdRange>();
  const auto may_not = excluded ? id_ranges(*excluded, "excluded") : std::vector<IdRange>();
  std::vector<Filter> filters;
  for (int64_t q = 0; q < p.queries; ++q) {
    const int64_t i = data<int64_t>(numbers)[q], ids = mask ? mask->size(1) : 0;
    bool known = i >= 0 && (!mask || i < mask->size(0)) && (!allowed || i < static_cast<int64_t>(may.size()));
    known = known && (!excluded || i < static_cast<int64_t>(may_not.size()));
    check_that(known, "filter must number masks and lists of ids, got ", i);
    const bool* passing = ids ? data<bool>(*mask) + i * ids : mask ? &kNoId : nullptr;
    filters.push_back({passing, nullptr, ids, allowed.has_value(),
                       allowed ? may[i] : IdRange{}, excluded ? may_not[i] : IdRange{}});
  }
  return filters;
}

// One more than the largest id of lists that allow ids; 0 if one is negative, or so large that bits for all ids below it
// would take much more memory than the rows.
inline int64_t listed_ids(const Problem& p, const std::vector<Filter>& filters) {
  constexpr int64_t kSparse = 16; // ids a row
  int64_t last = 0;
  for (const Filter& filter : filters) {
    if (filter.allowed.first != filter.allowed.last) {
      last = *filter.allowed.first < 0 ? INT64_MAX : std::max(last, filter.allowed.last[-1]);
    }
  }
  return last / kSparse < p.segments[0].rows ? last + 1 : 0;
}

// A problem of one segment and the lists that each query reads of it.
inline Problem scan_problem(
    const Tensor& x, const Tensor& packed, const Tensor& bias, const Tensor& offsets, const Tensor& sizes,
    const Tensor& probed, const std::optional<Tensor>& limits, int64_t k, int64_t max_bytes) {
  Problem p = problem_of(x, k, max_bytes);
  add_segment(p, packed, bias, offsets, sizes, nullptr);
  set_probed(p, probed, limits);
  return p;
}

// Codes of the rows of `lists` lists.
inline Codes codes_of(const std::vector<Tensor>& codes, int64_t lists, int64_t d) {
  check_that(codes.size() == 5, "codes must be 5 tensors, got ", codes.size());
  check(codes[0], "centres", 2, ScalarType::Float);
  check(codes[1], "panels", 1, ScalarType::Byte);
  check(codes[2], "first", 1, ScalarType::Long);
  check(codes[3], "norms", 2, ScalarType::Float);
  check(codes[4], "limits", 2, ScalarType::Float);
  const int64_t panels = codes[3].size(0), *first = data<int64_t>(codes[2]);
  bool fits = codes[0].size(0) == lists && codes[0].size(1) == d && codes[2].size(0) == lists + 1;
  fits = fits && codes[4].size(0) == lists && codes[4].size(1) == 3 && codes[3].size(1) == 2;
  fits = fits && first[0] == 0 && first[lists] == panels && codes[1].size(0) == panels * panel_bytes(d);
  check_that(fits && d <= kMostCodedDim, "codes must be those that encode_lists returns for these lists");
  return {data<float>(codes[0]), data<uint8_t>(codes[1]), first, data<float>(codes[3]), data<float>(codes[4])};
}

// Centroids, bias and origin, and codes of the centroids as one list if there are more tensors.
inline Coarse coarse_of(const Problem& p, const std::vector<Tensor>& coarse, SearchCodes search_codes) {
  constexpr size_t kFields = 3;
  check_that(coarse.size() == kFields || coarse.size() == kFields + 5, "coarse must be 3 or 8 tensors, got ", coarse.size());
  const Tensor &centroids = coarse[0], &bias = coarse[1], &origin = coarse[2];
  check(centroids, "centroids", 2, ScalarType::Float);
  check(bias, "bias", 1, ScalarType::Float);
  check(origin, "origin", 1, ScalarType::Float);
  const int64_t lists = centroids.size(0);
  check_that(centroids.size(1) == p.d, "centroids must have the columns of x");
  check_that(origin.size(0) == p.d, "origin must have the columns of x");
  check_that(bias.size(0) == 0 || bias.size(0) == lists, "bias must be empty or of one entry a centroid");
  Coarse out{data<float>(centroids), bias.size(0) ? data<float>(bias) : nullptr, data<float>(origin), lists, {}, search_codes};
  if (coarse.size() > kFields) {
    out.codes = codes_of({coarse.begin() + kFields, coarse.end()}, 1, p.d);
  }
  return out;
}

} // namespace torch_ivf_module
