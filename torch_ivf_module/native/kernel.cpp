// The operators torch.ops.torch_ivf_module.*: checks of their arguments, and their schemas. By torch's stable ABI alone, so
// that one binary serves every version of torch from 2.10 on.
//
// Q queries, L lists, P probes, N vectors, d dim, k results, H hits.

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include <tuple>

#include "arguments.h"
#include "cells.h"
#include "isa.h"

namespace torch_ivf_module {
namespace {

// Scores and rows (Q, k), to be filled.
struct Results {
  Tensor scores, rows;

  Results(int64_t queries, int64_t k)
      : scores(empty({queries, k}, aoti_torch_dtype_float32())), rows(empty({queries, k}, aoti_torch_dtype_int64())) {}

  Best best() const {
    return {results<float>(scores), results<int64_t>(rows)};
  }
};

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
    check_that(panels < kMost, "lists must have less than 2^31 panels"); // lists that overlap could have any number
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
    const std::optional<std::vector<Tensor>>& codes,
    const std::optional<Tensor>& probed,
    const std::optional<Tensor>& limits,
    int64_t k,
    int64_t kept,
    int64_t nprobe,
    int64_t max_codes,
    bool differences,
    int64_t max_bytes,
    const std::optional<Tensor>& filter,
    const std::optional<Tensor>& mask,
    const std::optional<std::vector<Tensor>>& allowed,
    const std::optional<std::vector<Tensor>>& excluded) {
  constexpr size_t kFields = 5;
  const size_t count = segments.size() / kFields;
  const bool known = segments.size() % kFields == 0 && count >= 1 && count <= kMostSegments;
  check_that(known, "segments must be 5 tensors for each of at most 2 segments, got ", segments.size());
  check_that(kept >= k, "kept must be >= k, got ", kept, " and ", k);
  check_that(probed || nprobe > 0, "nprobe must be >= 1, got ", nprobe);
  check_that(probed || !limits, "limits must come with probed");
  check_that(max_codes >= 0, "max_codes must be >= 0, got ", max_codes);
  Request request{problem_of(x, k, max_bytes), {}, 0, max_codes, kept, differences, nullptr, nullptr, nullptr};
  Problem& p = request.problem;
  int64_t rows = 0;
  for (size_t i = 0; i < segments.size(); i += kFields) {
    add_segment(p, segments[i], segments[i + 4], segments[i + 1], segments[i + 3], &segments[i + 2]);
    rows += segments[i].size(0);
  }
  request.kept = std::max(k, std::min(kept, rows + 1));
  request.coarse = coarse_of(p, coarse, codes_core().search);
  if (probed) {
    set_probed(p, *probed, limits);
  } else {
    check_that(request.coarse.lists == p.lists, "segments must have a list for each centroid");
    request.nprobe = std::min(nprobe, p.lists);
  }
  const std::vector<Filter> filters = filter ? filters_of(p, *filter, mask, allowed, excluded) : std::vector<Filter>();
  p.filters = filter ? filters.data() : nullptr;
  p.listed_ids = allowed && !mask ? listed_ids(p, filters) : 0;
  const Codes encoded = codes ? codes_of(*codes, p.lists, p.d) : Codes{};
  if (codes) {
    request.codes = &encoded;
    request.search_codes = codes_core().search;
  } else if ((p.dtype == Dtype::kCode8 || p.dtype == Dtype::kCode4) && p.d <= kMostCodedDim) {
    request.search_coded_rows = codes_core().search_coded_rows;
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
    const Tensor& x, const std::vector<Tensor>& quantizer, int64_t nprobe, bool differences, int64_t max_bytes) {
  const Problem p = problem_of(x, nprobe, max_bytes);
  const Coarse coarse = coarse_of(p, quantizer, codes_core().search);
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

// The cells of the groups (Q,) in the lists probed (Q, P), as lists of their own: offsets, sizes, and which of them each
// query reads (Q, P). `cells` are groups, keys, offsets and sizes, see functional/cells.py.
std::tuple<Tensor, Tensor, Tensor> group_cells(
    const Tensor& probed, const Tensor& groups, const std::vector<Tensor>& cells) {
  check(probed, "probed", 2, ScalarType::Long);
  check(groups, "groups", 1, ScalarType::Long);
  check_that(cells.size() == 4, "cells must be 4 tensors, got ", cells.size());
  for (const Tensor& field : cells) {
    check(field, "cells", 1, ScalarType::Long);
  }
  const int64_t queries = probed.size(0), probes = probed.size(1), count = cells[1].size(0) - 1;
  check_that(groups.size(0) == queries, "groups must have an entry for each query");
  check_that(count >= 0 && cells[2].size(0) == count + 1 && cells[3].size(0) == count + 1, "cells must be of equal length");
  const Cells known{data<int64_t>(cells[0]), data<int64_t>(cells[1]), cells[0].size(0), count};
  std::vector<int64_t> found = cells_of_pairs(known, data<int64_t>(probed), data<int64_t>(groups), queries, probes);
  const std::vector<int64_t> used = distinct_cells(found, count);
  const auto lists = static_cast<int64_t>(used.size());
  const Tensor offsets = empty({lists}, aoti_torch_dtype_int64()), sizes = empty({lists}, aoti_torch_dtype_int64());
  for (int64_t i = 0; i < lists; ++i) {
    results<int64_t>(offsets)[i] = data<int64_t>(cells[2])[used[i]];
    results<int64_t>(sizes)[i] = data<int64_t>(cells[3])[used[i]];
  }
  const Tensor moved = empty({queries, probes}, aoti_torch_dtype_int64());
  std::copy(found.begin(), found.end(), results<int64_t>(moved));
  return {offsets, sizes, moved};
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
      "probe(Tensor x, Tensor[] coarse, int nprobe, bool differences, int max_bytes) -> (Tensor, Tensor)");
  library.def(
      "search_index(Tensor x, Tensor[] coarse, Tensor[] segments, Tensor[]? codes, Tensor? probed, Tensor? limits, int k, "
      "int kept, int nprobe, int max_codes, bool differences, int max_bytes, Tensor? filter=None, Tensor? mask=None, "
      "Tensor[]? allowed=None, Tensor[]? excluded=None) "
      "-> (Tensor, Tensor, Tensor, Tensor, Tensor)");
  library.def("group_cells(Tensor probed, Tensor groups, Tensor[] cells) -> (Tensor, Tensor, Tensor)");
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
  library.impl("group_cells", TORCH_BOX(&group_cells));
  library.impl("scan_above", TORCH_BOX(&scan_above));
}

} // namespace
} // namespace torch_ivf_module
