// What ComputeType::automatic stands for.
#pragma once

#include "kernels/kernels.h"
#include "mixedkv/attention.h"

namespace mixedkv {

/// params.compute_type, or what automatic comes to in this call: f32, without measuring anything,
/// where no tile of it would be in bf16.
ComputeType settled_compute_type(const AttentionProblem *problems, int num_problems,
                                 const AttentionParams &params);

} // namespace mixedkv
