// Which instruction sets this build carries, which of them this machine can run, and which one
// is in use. One ordered list, best first.
#pragma once

#include "kernels/kernels.h"

#include <string>
#include <vector>

namespace mixedkv {

/// One entry for each variant compiled into this library, best first.
struct IsaInfo {
  const char *name;
  bool available;        ///< this machine can run it
  const char *requires_; ///< CPU features it needs, for messages: "avx2 fma f16c"
  bool has_bf16;         ///< it has kernels for arithmetic in bf16
};

/// All variants of this build, best first; "scalar" is always the last.
std::vector<IsaInfo> compiled_isas();
/// Names of those that this machine can run, best first.
std::vector<std::string> available_isas();
/// The table in use. The first call settles it: MIXEDKV_ISA where set (and not empty), else the
/// best one that the machine can run. Throws std::invalid_argument where MIXEDKV_ISA names an
/// ISA that is unknown or that this machine lacks. Cheap after the first call.
const Kernels &active_kernels();
/// Take the named one from now on. Throws std::invalid_argument (naming it and the available
/// ones) where it is unknown or this machine lacks it; then nothing changes.
void select_isa(const std::string &name);
/// The table of a named ISA without selecting it, for tests and benchmarks; throws as above.
const Kernels &kernels_for(const std::string &name);

} // namespace mixedkv
