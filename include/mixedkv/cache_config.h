// The options of a cache: a line each, with type, name, default and meaning. The struct, the
// bindings and the test that holds Python's CacheConfig to them all go through this list.
#pragma once

#include "mixedkv/export.h"
#include "mixedkv/formats.h"

#include <cstdint>
#include <vector>

namespace mixedkv {

// clang-format off
#define MIXEDKV_CACHE_FIELDS(FIELD) \
  FIELD(int, num_layers, 1, "Layers of the model.") \
  FIELD(int, num_kv_heads, 1, "Heads of K and of V.") \
  FIELD(int, head_dim, 0, "Values in a row of K, whole blocks of its types.") \
  FIELD(int, head_dim_v, 0, "Values in a row of V, likewise.") \
  FIELD(std::int64_t, hot_size, 1024, "Hot cells (tokens), all sequences together.") \
  FIELD(std::int64_t, cold_size, 4096, "Cold cells, likewise; none without quantize.") \
  FIELD(std::int64_t, group_size, 256, "Most tokens moved in one batch.") \
  FIELD(double, threshold, 0.8, "A move is due above floor(threshold * hot_size) hot cells.") \
  FIELD(std::int64_t, n_pad, 32, "What both sizes are multiples of.") \
  FIELD(int, n_seq_max, 1, "Sequence ids are 0 to n_seq_max - 1.") \
  FIELD(Format, hot_k_type, Format::f16, "Type of hot keys.") \
  FIELD(Format, hot_v_type, Format::f16, "Type of hot values.") \
  FIELD(Format, cold_k_type, Format::q4_0, "Type of cold keys.") \
  FIELD(Format, cold_v_type, Format::q4_0, "Type of cold values.") \
  FIELD(int, sink_tokens, 0, "First positions of each sequence, which stay hot.") \
  FIELD(int, hot_keep, 0, "Newest positions of each sequence, which stay hot.") \
  FIELD(bool, rotate, false, "Hold rows rotated (Hadamard), so that they quantise better.") \
  FIELD(std::int64_t, window_left, -1, "attend's default window; -1: none.") \
  FIELD(std::vector<std::uint8_t>, layer_filter, {}, "[num_layers], non-zero: held; empty: all.") \
  FIELD(bool, center_keys, false, "Cold keys of quantised types: less a vector 128 cells share.") \
  FIELD(bool, fit_scales, false, "Scales of q4_0 and iq4_nl by least squared error, not ggml's.") \
  FIELD(bool, quantize, true, "Off: one tier, no moves; cold is not allocated.")
// clang-format on

struct CacheConfig {
#define MIXEDKV_MEMBER(type, name, value, meaning) type name = value;
  MIXEDKV_CACHE_FIELDS(MIXEDKV_MEMBER)
#undef MIXEDKV_MEMBER
};

/// Throws std::invalid_argument, naming the first field that is wrong, by itself or beside the
/// others, and its value. A cache that is made of a configuration asks this first; nothing is
/// allocated.
MIXEDKV_API void check_config(const CacheConfig &config);

/// Calls f(name, pointer to member, meaning) for every option, in order.
template <typename F> void for_each_field(F &&f) {
#define MIXEDKV_VISIT(type, name, value, meaning) f(#name, &CacheConfig::name, meaning);
  MIXEDKV_CACHE_FIELDS(MIXEDKV_VISIT)
#undef MIXEDKV_VISIT
}

#undef MIXEDKV_CACHE_FIELDS

} // namespace mixedkv
