// The machine: how many threads a call uses, and which instruction set. Both hold for the whole
// process and may be set at any time, from any thread; calls that run meanwhile end as they began.
#pragma once

#include "mixedkv/export.h"

#include <string>
#include <vector>

namespace mixedkv {

/// Threads that a call uses where it does not say: set_num_threads, else MIXEDKV_NUM_THREADS,
/// else the CPUs that this process may use (affinity mask and cgroup quota). Results have the same
/// bits for any number.
MIXEDKV_API int get_num_threads();
/// Throws std::invalid_argument unless 1 <= n <= 1024.
MIXEDKV_API void set_num_threads(int n);

/// One entry for each variant compiled into this library, best first.
struct IsaInfo {
  const char *name;
  bool available;        ///< this machine can run it
  const char *requires_; ///< CPU features it needs, for messages: "avx2 fma f16c"
  bool has_bf16;         ///< it has kernels for arithmetic in bf16
};

/// All variants of this build, best first; "scalar" is always the last.
MIXEDKV_API std::vector<IsaInfo> compiled_isas();
/// Names of those that this machine can run, best first.
MIXEDKV_API std::vector<std::string> available_isas();
/// The one in use. The first call, or the first that computes, settles it: MIXEDKV_ISA where set
/// (and not empty), else the best one that the machine can run. Throws std::invalid_argument where
/// MIXEDKV_ISA names an ISA that is unknown or that this machine lacks, as everything that computes
/// does then.
MIXEDKV_API const char *active_isa();
/// Take the named one from now on. Throws std::invalid_argument (naming it and the available
/// ones) where it is unknown or this machine lacks it; then nothing changes.
MIXEDKV_API void select_isa(const std::string &name);

} // namespace mixedkv
