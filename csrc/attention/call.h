// The op for callers whose lists of keys are right by construction.
#pragma once

#include "mixedkv/attention.h"

namespace mixedkv {

/// As attend, without a look at indices and pages.
void attend_unchecked(const AttentionProblem *problems, int num_problems,
                      const AttentionParams &params);

} // namespace mixedkv
