// Which of the instruction sets that the cores are compiled for this process uses: the best one that this CPU runs, or the
// one that the environment variable TORCH_IVF_NATIVE_ISA names.
#pragma once

#include "core.h"

namespace torch_ivf_module {

// These throw std::runtime_error where the CPU does not run the one that is named.
const Core& core();
const CodesCore& codes_core();
const char* isa();

} // namespace torch_ivf_module
