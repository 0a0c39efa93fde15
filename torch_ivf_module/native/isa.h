// Which of the cores, one for each instruction set, this process uses.
#pragma once

#include "core.h"

namespace torch_ivf_module {

// The best one that this CPU runs, or the one that the environment variable TORCH_IVF_NATIVE_ISA names. Throws
// std::runtime_error where the CPU does not run that one.
const Core& core();

// The same for codes, which has variants for more instruction sets.
const CodesCore& codes_core();

} // namespace torch_ivf_module
