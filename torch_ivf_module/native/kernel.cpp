// The operators torch.ops.torch_ivf_module.*: checks of their arguments, and their schemas. By torch's stable ABI alone, so
// that one binary serves every version of torch from 2.10 on.
//
// Q queries, L lists, P probes, N vectors, d dim, k results, H hits.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include <algorithm>
#include <optional>
#include <sstream>
#include <stdexcept>
#include <tuple>
#include <vector>

#include "isa.h"
#include "rows.h"

namespace torch_ivf_module {
namespace {

constexpr int64_t kMost = int64_t{1} << 31; // rows of a tensor, which are counted in 32 bits

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

template <typename T>
T* results(const Tensor& tensor) {
  return static_cast<T*>(tensor.mutable_data_ptr());
}

// The type of stored rows (N, W) of dimension d.
Dtype dtype_of(const Tensor& packed, int64_t d) {
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

int64_t thread_count() {
  uint32_t threads = 1;
  TORCH_ERROR_CODE_CHECK(torch_get_num_threads(&threads));
  return std::max<int64_t>(1, threads);
}

// Queries of a problem without lists.
Problem problem_of(const Tensor& x, int64_t k, int64_t max_bytes) {
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

void add_segment(
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

void set_probed(Problem& p, const Tensor& probed, const std::optional<Tensor>& limits) {
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

// A problem of one segment and the lists that each query reads of it.
Problem scan_problem(
    const Tensor& x, const Tensor& packed, const Tensor& bias, const Tensor& offsets, const Tensor& sizes,
    const Tensor& probed, const std::optional<Tensor>& limits, int64_t k, int64_t max_bytes) {
  Problem p = problem_of(x, k, max_bytes);
  add_segment(p, packed, bias, offsets, sizes, nullptr);
  set_probed(p, probed, limits);
  return p;
}

Coarse coarse_of(const Problem& p, const Tensor& centroids, const Tensor& bias, const Tensor& origin) {
  check(centroids, "centroids", 2, ScalarType::Float);
  check(bias, "bias", 1, ScalarType::Float);
  check(origin, "origin", 1, ScalarType::Float);
  const int64_t lists = centroids.size(0);
  check_that(centroids.size(1) == p.d, "centroids must have the columns of x");
  check_that(origin.size(0) == p.d, "origin must have the columns of x");
  check_that(bias.size(0) == 0 || bias.size(0) == lists, "bias must be empty or of one entry a centroid");
  return {data<float>(centroids), bias.size(0) ? data<float>(bias) : nullptr, data<float>(origin), lists};
}

// Scores and rows (Q, k), to be filled.
struct Results {
  Tensor scores, rows;

  Results(int64_t queries, int64_t k)
      : scores(empty({queries, k}, aoti_torch_dtype_float32())), rows(empty({queries, k}, aoti_torch_dtype_int64())) {}

  Best best() const {
    return {results<float>(scores), results<int64_t>(rows)};
  }
};

// Codes of the rows of the first segment.
Codes codes_of(const Problem& p, const std::vector<Tensor>& codes) {
  check_that(codes.size() == 5, "codes must be 5 tensors, got ", codes.size());
  check(codes[0], "centres", 2, ScalarType::Float);
  check(codes[1], "panels", 1, ScalarType::Byte);
  check(codes[2], "first", 1, ScalarType::Long);
  check(codes[3], "norms", 2, ScalarType::Float);
  check(codes[4], "limits", 2, ScalarType::Float);
  const int64_t panels = codes[3].size(0), *first = data<int64_t>(codes[2]);
  bool fits = codes[0].size(0) == p.lists && codes[0].size(1) == p.d && codes[2].size(0) == p.lists + 1;
  fits = fits && codes[4].size(0) == p.lists && codes[4].size(1) == 3 && codes[3].size(1) == 2;
  fits = fits && first[0] == 0 && first[p.lists] == panels && codes[1].size(0) == panels * panel_bytes(p.d);
  check_that(fits && p.d <= kMostCodedDim, "codes must be those that encode_lists returns for these lists");
  return {data<float>(codes[0]), data<uint8_t>(codes[1]), first, data<float>(codes[3]), data<float>(codes[4])};
}

// Searches read it everywhere: with pages of 4 KiB looking up their addresses takes a good part of the time.
void prefer_huge_pages([[maybe_unused]] const Tensor& bytes) {
#if defined(__linux__)
  constexpr uintptr_t kHuge = 2 << 20;
  const auto begin = reinterpret_cast<uintptr_t>(bytes.mutable_data_ptr());
  const uintptr_t first = (begin + kHuge - 1) / kHuge * kHuge, last = (begin + bytes.numel()) / kHuge * kHuge;
  if (first < last) {
    madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE); // only a hint: it may fail
  }
#endif
}

// Codes of the rows of lists: centres, panels, first, norms, limits, see functional/codec.py.
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> encode_lists(
    const Tensor& packed, const Tensor& offsets, const Tensor& sizes, int64_t d) {
  Problem p{};
  check(packed, "packed", 2, packed.scalar_type());
  p.d = d;
  check_that(d > 0 && d <= kMostCodedDim, "d must be 1 to ", kMostCodedDim, ", got ", d);
  const Tensor none = empty({0}, aoti_torch_dtype_float32());
  add_segment(p, packed, none, offsets, sizes, nullptr);
  const Segment& lists = p.segments[0];
  const Tensor first = empty({p.lists + 1}, aoti_torch_dtype_int64());
  int64_t panels = 0;
  for (int64_t list = 0; list < p.lists; ++list) {
    const int64_t offset = lists.offsets[list], size = lists.sizes[list];
    const bool inside = offset >= 0 && size >= 0 && size <= lists.rows && offset <= lists.rows - size;
    check_that(inside, "list ", list, " must lie in packed, got rows ", offset, " and ", size, " more");
    results<int64_t>(first)[list] = panels;
    panels += (size + kCodedRows - 1) / kCodedRows;
  }
  results<int64_t>(first)[p.lists] = panels;
  const Tensor centres = empty({p.lists, p.d}, aoti_torch_dtype_float32());
  const Tensor bytes = empty({panels * panel_bytes(p.d)}, aoti_torch_dtype_uint8());
  prefer_huge_pages(bytes);
  const Tensor norms = empty({panels, 2}, aoti_torch_dtype_float32());
  const Tensor limits = empty({p.lists, 3}, aoti_torch_dtype_float32());
  codes_core().encode(
      lists, p.dtype, p.lists, p.d, thread_count(),
      {results<float>(centres), results<uint8_t>(bytes), data<int64_t>(first), results<float>(norms),
       results<float>(limits)});
  return {centres, bytes, first, norms, limits};
}

// A whole search of one or two segments: see search of ops.py.
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> search_index(
    const Tensor& x,
    const std::vector<Tensor>& coarse,
    const std::vector<Tensor>& segments,
    const std::vector<Tensor>& codes,
    const std::optional<Tensor>& probed,
    const std::optional<Tensor>& limits,
    int64_t k,
    int64_t kept,
    int64_t nprobe,
    int64_t max_codes,
    bool differences,
    int64_t max_bytes) {
  constexpr size_t kFields = 5;
  const size_t count = segments.size() / kFields;
  check_that(coarse.size() == 3, "coarse must be 3 tensors, got ", coarse.size());
  const bool known = segments.size() % kFields == 0 && count >= 1 && count <= kMostSegments;
  check_that(known, "segments must be 5 tensors for each of at most 2 segments, got ", segments.size());
  check_that(kept >= k, "kept must be >= k, got ", kept, " and ", k);
  check_that(probed || nprobe > 0, "nprobe must be >= 1, got ", nprobe);
  check_that(probed || !limits, "limits must come with probed");
  check_that(max_codes >= 0, "max_codes must be >= 0, got ", max_codes);
  Request request{problem_of(x, k, max_bytes), {}, 0, max_codes, kept, differences, nullptr, nullptr};
  Problem& p = request.problem;
  int64_t rows = 0;
  for (size_t i = 0; i < segments.size(); i += kFields) {
    add_segment(p, segments[i], segments[i + 4], segments[i + 1], segments[i + 3], &segments[i + 2]);
    rows += segments[i].size(0);
  }
  request.kept = std::max(k, std::min(kept, rows + 1));
  request.coarse = coarse_of(p, coarse[0], coarse[1], coarse[2]);
  if (probed) {
    set_probed(p, *probed, limits);
  } else {
    check_that(request.coarse.lists == p.lists, "segments must have a list for each centroid");
    request.nprobe = std::min(nprobe, p.lists);
  }
  const Codes encoded = codes.empty() ? Codes{} : codes_of(p, codes);
  if (!codes.empty()) {
    request.codes = &encoded;
    request.search_codes = codes_core().search;
  }
  const Results found(p.queries, k);
  const Tensor ids = empty({p.queries, k}, aoti_torch_dtype_int64());
  const Tensor again = empty({p.queries}, aoti_torch_dtype_bool());
  const Tensor scored = empty({p.queries}, aoti_torch_dtype_int64());
  core().search(request, {found.best(), results<int64_t>(ids), results<bool>(again), results<int64_t>(scored)});
  return {found.scores, found.rows, ids, again, scored};
}

// The nearest lists of finite queries, nearest first: exact scores and lists (Q, P).
std::tuple<Tensor, Tensor> probe(
    const Tensor& x, const Tensor& centroids, const Tensor& bias, const Tensor& origin, int64_t nprobe,
    bool differences, int64_t max_bytes) {
  const Problem p = problem_of(x, nprobe, max_bytes);
  const Coarse coarse = coarse_of(p, centroids, bias, origin);
  const int64_t probes = std::min(nprobe, coarse.lists);
  const Results found(p.queries, probes);
  core().probe(coarse, p.x, p.queries, p.d, probes, differences, p.within, found.best());
  return {found.scores, found.rows};
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
  const Problem p = scan_problem(x, packed, bias, offsets, sizes, probed, limits, k, max_bytes);
  const Results found(p.queries, k);
  core().scan(p, found.best());
  return {found.scores, found.rows};
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
  const Problem p = scan_problem(x, packed, bias, offsets, sizes, probed, std::nullopt, 1, 0);
  check(threshold, "threshold", 1, ScalarType::Float);
  check_that(threshold.size(0) == p.queries, "threshold must have an entry for each query");
  const Tensor lims = empty({p.queries + 1}, aoti_torch_dtype_int64());
  std::optional<Tensor> rows;
  const auto rows_of_hits = [&](int64_t hits) {
    rows = empty({hits}, aoti_torch_dtype_int64());
    return results<int64_t>(*rows);
  };
  core().scan_above(p, data<float>(threshold), results<int64_t>(lims), rows_of_hits);
  return {lims, *rows};
}

std::string isa_name() {
  return isa();
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
      "probe(Tensor x, Tensor centroids, Tensor bias, Tensor origin, int nprobe, bool differences, int max_bytes) "
      "-> (Tensor, Tensor)");
  library.def(
      "search_index(Tensor x, Tensor[] coarse, Tensor[] segments, Tensor[] codes, Tensor? probed, Tensor? limits, int k, "
      "int kept, int nprobe, int max_codes, bool differences, int max_bytes) "
      "-> (Tensor, Tensor, Tensor, Tensor, Tensor)");
  library.def("encode_lists(Tensor packed, Tensor offsets, Tensor sizes, int d) -> (Tensor, Tensor, Tensor, Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(torch_ivf_module, CompositeExplicitAutograd, library) {
  library.impl("isa", TORCH_BOX(&isa_name));
}

STABLE_TORCH_LIBRARY_IMPL(torch_ivf_module, CPU, library) {
  library.impl("probe", TORCH_BOX(&probe));
  library.impl("search_index", TORCH_BOX(&search_index));
  library.impl("scan", TORCH_BOX(&scan));
  library.impl("encode_lists", TORCH_BOX(&encode_lists));
  library.impl("scan_above", TORCH_BOX(&scan_above));
}

} // namespace
} // namespace torch_ivf_module
