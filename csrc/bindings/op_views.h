// What the op over arrays, over pages and in a cache reads alike: options, and where results go.
#pragma once

#include "bindings/arrays.h"

#include "mixedkv/attention.h"

namespace mixedkv::bindings {

struct OpSizes {
  std::int64_t num_qo_heads;
  std::int64_t num_kv_heads;
  std::int64_t head_dim;
  std::int64_t head_dim_v;
};

/// Options as Python's functions have them.
struct OpOptions {
  double sm_scale;
  double logits_soft_cap;
  bool causal;
  std::int64_t window_left;
  std::int64_t window_right;
  const OptionalArray &alibi_slopes;
  const OptionalArray &sinks;
  int threads;
  const std::string &compute_type;
};

inline AttentionParams read_params(const OpSizes &sizes, const OpOptions &options) {
  AttentionParams params;
  params.num_qo_heads = narrow(sizes.num_qo_heads, "num_qo_heads");
  params.num_kv_heads = narrow(sizes.num_kv_heads, "num_kv_heads");
  params.head_dim = narrow(sizes.head_dim, "head_dim");
  params.head_dim_v = narrow(sizes.head_dim_v, "head_dim_v");
  params.sm_scale = static_cast<float>(options.sm_scale);
  params.logits_soft_cap = static_cast<float>(options.logits_soft_cap);
  params.causal = options.causal;
  params.window_left = options.window_left;
  params.window_right = options.window_right;
  params.alibi_slopes = per_head(options.alibi_slopes, "alibi_slopes", sizes.num_qo_heads);
  params.sinks = per_head(options.sinks, "sinks", sizes.num_qo_heads);
  params.num_threads = options.threads;
  params.compute_type = parse_compute_type(options.compute_type);
  return params;
}

constexpr auto kFloatSize = static_cast<std::ptrdiff_t>(sizeof(float));

/// Results from data on; strides in bytes, as arrays have them.
inline OutputView output_view(char *data, std::ptrdiff_t head_stride, std::ptrdiff_t row_stride) {
  OutputView view;
  view.data = reinterpret_cast<float *>(data);
  view.head_stride = head_stride / kFloatSize;
  view.row_stride = row_stride / kFloatSize;
  return view;
}

/// Likewise its lse.
inline void set_lse(OutputView &view, char *data, std::ptrdiff_t head_stride,
                    std::ptrdiff_t row_stride) {
  view.lse = reinterpret_cast<float *>(data);
  view.lse_head_stride = head_stride / kFloatSize;
  view.lse_row_stride = row_stride / kFloatSize;
}

} // namespace mixedkv::bindings
