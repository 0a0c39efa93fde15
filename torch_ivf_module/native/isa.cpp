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
  const char* isa;
  const Core* core;
  const CodesCore* codes;
  bool runs;
};

#if defined(TORCH_IVF_X86_ISAS)
// CPUID leaf 7, subleaf 1: EAX, bit 4. Not every compiler has a name for it.
bool cpu_has_avx_vnni() {
  unsigned a = 0, b = 0, c = 0, d = 0;
  return __get_cpuid_count(7, 1, &a, &b, &c, &d) && (a >> 4 & 1);
}
#endif

const Choice& chosen() {
#if defined(TORCH_IVF_X86_ISAS)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") &&
      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512bw");
  static const Choice choices[] = {
      {"avx512_vnni", &core_avx512, &codes_core_avx512_vnni, avx512 && __builtin_cpu_supports("avx512vnni")},
      {"avx512", &core_avx512, &codes_core_avx512, avx512},
      {"avx_vnni", &core_avx2, &codes_core_avx_vnni, avx2 && cpu_has_avx_vnni()},
      {"avx2", &core_avx2, &codes_core_avx2, avx2},
      {"baseline", &core_baseline, &codes_core_baseline, true}};
#else
  static const Choice choices[] = {{"baseline", &core_baseline, &codes_core_baseline, true}};
#endif
  const char* variable = std::getenv("TORCH_IVF_NATIVE_ISA");
  const std::string_view name = variable ? variable : "";
  std::string known;
  for (const Choice& choice : choices) {
    if (choice.runs && (name.empty() || name == choice.isa)) {
      return choice;
    }
    known += choice.runs ? (known.empty() ? "" : ", ") + std::string(choice.isa) : "";
  }
  throw std::runtime_error(
      "TORCH_IVF_NATIVE_ISA must be one that this CPU and this kernel have, got " + std::string(name) + "; it has " + known);
}

const Choice& choice() {
  static const Choice& one = chosen(); // an exception leaves it to be set by the next call
  return one;
}

} // namespace

const Core& core() {
  return *choice().core;
}

const CodesCore& codes_core() {
  return *choice().codes;
}

const char* isa() {
  return choice().isa;
}

} // namespace torch_ivf_module
