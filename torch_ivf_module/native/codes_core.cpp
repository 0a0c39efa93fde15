// Searches by codes, and codes, on plain pointers. Compiled once for each instruction set with products of bytes, as
// codes_core_TORCH_IVF_ISA.

#include "codes_search.h"
#include "encode.h"

namespace torch_ivf_module {
namespace {

void encode(const Segment& lists, Dtype dtype, int64_t count, int64_t d, int64_t threads, const EncodedLists& out) {
  with_type(dtype, [&](auto type) { encode_lists<decltype(type)>(lists, count, d, threads, out); });
}

} // namespace

#define JOINED(one, other) one##other
#define CORE_OF(isa) JOINED(codes_core_, isa)

extern const CodesCore CORE_OF(TORCH_IVF_ISA);
const CodesCore CORE_OF(TORCH_IVF_ISA) = {encode, search_codes, search_coded_rows};

} // namespace torch_ivf_module
