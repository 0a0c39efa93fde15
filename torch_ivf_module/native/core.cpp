// Searches on plain pointers. Compiled once for each instruction set, as core_TORCH_IVF_ISA.

#include "range_scan.h"
#include "search.h"

namespace torch_ivf_module {
namespace {

void search_request(const Request& request, const Answer& answer) {
  with_type(request.problem.dtype, [&](auto number) { search<decltype(number)>(request, answer); });
}

void scan_problem(const Problem& p, Best best) {
  with_type(p.dtype, [&](auto number) { scan<decltype(number)>(p, best); });
}

void scan_problem_above(
    const Problem& p, const float* threshold, int64_t* lims, const std::function<int64_t*(int64_t)>& rows_of) {
  with_type(p.dtype, [&](auto number) { scan_above<decltype(number)>(p, threshold, lims, rows_of); });
}

} // namespace

#define JOINED(one, other) one##other
#define CORE_OF(isa) JOINED(core_, isa)

extern const Core CORE_OF(TORCH_IVF_ISA);
const Core CORE_OF(TORCH_IVF_ISA) = {
    search_request, nearest_lists, scan_problem, scan_problem_above};

} // namespace torch_ivf_module
