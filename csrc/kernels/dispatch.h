// The kernels in use. Which instruction sets this build carries, which of them this machine can
// run, and which one is taken: mixedkv/runtime.h. One ordered list, best first.
#pragma once

#include "kernels/kernels.h"
#include "mixedkv/runtime.h"

#include <string>

namespace mixedkv {

/// The table in use. The first call settles it: MIXEDKV_ISA where set (and not empty), else the
/// best one that the machine can run. Throws std::invalid_argument where MIXEDKV_ISA names an
/// ISA that is unknown or that this machine lacks. Cheap after the first call.
const Kernels &active_kernels();
/// The table of a named ISA without selecting it, for tests and benchmarks; throws as above.
const Kernels &kernels_for(const std::string &name);

} // namespace mixedkv
