// The caller's structures of the op, checked and turned into the core's.
#pragma once

#include "capi/checks.h"
#include "mixedkv/attention.h"

namespace mixedkv::capi {

constexpr std::size_t kFloat = alignof(float);

/// Structures of an array have one size, or there would be no telling where the next one begins.
void check_same_size(const Name &name, std::size_t size, std::size_t first);
/// That so many rows of width floats have a size in bytes.
void check_floats(const Name &name, std::int64_t rows, std::int64_t width);

QueryView read_queries(std::int64_t problem, const mixedkv_queries *from);
/// Segment `number` of the problem's array.
KeySegment read_segment(std::int64_t problem, std::int64_t number, const mixedkv_segment *segments,
                        const AttentionParams &params);
MaskView read_mask(std::int64_t problem, const mixedkv_mask *from, bool has_entries);
/// name: the structure's.
StateView read_state(const Name &name, const mixedkv_state *from, bool needs_acc = true);
OutputView read_output(const Name &name, const mixedkv_output *from, std::int64_t num_heads,
                       std::int64_t len, std::int64_t head_dim_v);

} // namespace mixedkv::capi
