#include "isa.h"

#if defined(TORCH_IVF_X86_ISAS)
#include <cpuid.h>
#endif

#include <cstdlib>
#include <stdexcept>
#include <string>
#include <string_view>

namespace torch_ivf_module {

extern const Core core_baseline;
extern const CodesCore codes_core_baseline;

#if defined(TORCH_IVF_X86_ISAS)
extern const Core core_avx2, core_avx512;
extern const CodesCore codes_core_avx2, codes_core_avx_vnni, codes_core_avx512, codes_core_avx512_vnni;
#endif

namespace {

struct Choice {
  const Core* core;
  bool runs;
};

#if defined(TORCH_IVF_X86_ISAS)
// CPUID leaf 7, subleaf 1: EAX, bit 4. Not every compiler knows its name.
bool cpu_has_avx_vnni() {
  unsigned a = 0, b = 0, c = 0, d = 0;
  return __get_cpuid_count(7, 1, &a, &b, &c, &d) && (a >> 4 & 1);
}
#endif

const Core& chosen() {
#if defined(TORCH_IVF_X86_ISAS)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") &&
      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512bw");
  const Choice choices[] = {{&core_avx512, avx512}, {&core_avx2, avx2}, {&core_baseline, true}};
#else
  const Choice choices[] = {{&core_baseline, true}};
#endif
  const char* variable = std::getenv("TORCH_IVF_NATIVE_ISA");
  const std::string_view name = variable ? variable : "";
  std::string known;
  for (const Choice& choice : choices) {
    if (choice.runs && (name.empty() || name == choice.core->isa)) {
      return *choice.core;
    }
    known += choice.runs ? (known.empty() ? "" : ", ") + std::string(choice.core->isa) : "";
  }
  throw std::runtime_error(
      "TORCH_IVF_NATIVE_ISA must be one that this CPU and this kernel have, got " + std::string(name) + "; it has " + known);
}

} // namespace

const CodesCore& codes_core() {
#if defined(TORCH_IVF_X86_ISAS)
  __builtin_cpu_init();
  const std::string_view isa = core().isa;
  if (isa == "avx512") {
    return __builtin_cpu_supports("avx512vnni") ? codes_core_avx512_vnni : codes_core_avx512;
  }
  if (isa == "avx2") {
    return cpu_has_avx_vnni() ? codes_core_avx_vnni : codes_core_avx2;
  }
#endif
  return codes_core_baseline;
}

const Core& core() {
  static const Core& one = chosen(); // an exception leaves it to be set by the next call
  return one;
}

} // namespace torch_ivf_module
