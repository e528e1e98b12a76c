// The algebra of online softmax on one row: a state is M, S and acc[head_dim_v], and stands for
// the keys seen so far. A state with M = -inf has seen none: it is neutral in a merge, and its acc
// is never read, whatever it holds.
#pragma once

#include "kernels/kernels.h"
#include "mixedkv/attention.h"

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <limits>

namespace mixedkv {

constexpr float kMinusInfinity = -std::numeric_limits<float>::infinity();

struct RowState {
  float m;
  float s;
};

/// What is below this much under the maximum weighs nothing: its weight would be smaller than the
/// smallest normal number. As Kernels::exp_sum has it.
constexpr float kLeastExponent = -87.33655f;

/// exp(difference), of maxima of states.
inline float weight_of(float difference) {
  return difference < kLeastExponent ? 0.0f : std::exp(difference);
}

/// acc *= weight; a weight of 0 leaves nothing, of infinities and NaN neither.
inline void scale_acc(const Kernels &kernels, float *acc, std::size_t head_dim_v, float weight) {
  if (weight == 0.0f) {
    for (std::size_t i = 0; i < head_dim_v; ++i) {
      acc[i] = 0.0f;
    }
  } else if (weight != 1.0f) {
    kernels.scale(acc, head_dim_v, weight);
  }
}

/// a becomes the state of what a and b saw together.
inline void merge_row(const Kernels &kernels, RowState &a, float *acc_a, const RowState &b,
                      const float *acc_b, std::size_t head_dim_v) {
  if (b.m == kMinusInfinity) {
    return;
  }
  if (a.m == kMinusInfinity) {
    a = b;
    for (std::size_t i = 0; i < head_dim_v; ++i) {
      acc_a[i] = acc_b[i];
    }
    return;
  }
  // A NaN on either side makes its weight NaN, and with it S and acc.
  const float m = a.m > b.m ? a.m : b.m;
  const float weight_a = weight_of(a.m - m);
  const float weight_b = weight_of(b.m - m);
  scale_acc(kernels, acc_a, head_dim_v, weight_a);
  if (weight_b != 0.0f) {
    kernels.axpy(weight_b, acc_b, acc_a, head_dim_v);
  }
  a.m = m;
  a.s = a.s * weight_a + b.s * weight_b;
}

/// out = acc / S; returns lse = M + ln S. A sink is a logit without a value: it takes part in S.
/// A row that saw no key gives zeros and -inf.
inline float finalize_row(const RowState &state, const float *acc, std::size_t head_dim_v,
                          const float *sink, float *out) {
  if (state.m == kMinusInfinity) {
    for (std::size_t i = 0; i < head_dim_v; ++i) {
      out[i] = 0.0f;
    }
    return kMinusInfinity;
  }
  float m = state.m;
  float s = state.s;
  float weight = 1.0f;
  if (sink != nullptr && *sink != kMinusInfinity) {
    m = state.m > *sink ? state.m : *sink;
    weight = weight_of(state.m - m);
    s = s * weight + std::exp(*sink - m);
  }
  const float factor = weight / s;
  for (std::size_t i = 0; i < head_dim_v; ++i) {
    out[i] = factor == 0.0f ? 0.0f : acc[i] * factor;
  }
  return m + std::log(s);
}

/// The same into the row of a query and head of out, lse too where it is asked for. sinks: of all
/// query heads, or null. transform: what values were changed by, or null.
inline void finalize_row(const RowState &state, const float *acc, std::size_t head_dim_v,
                         const float *sinks, const OutputView &out, int head, std::int64_t query,
                         const RowTransform *transform = nullptr) {
  const std::int64_t row = out.index != nullptr ? out.index[query] : query;
  float *to = out.data + head * out.head_stride + row * out.row_stride;
  const float lse =
      finalize_row(state, acc, head_dim_v, sinks != nullptr ? sinks + head : nullptr, to);
  if (transform != nullptr) {
    transform->undo(to, head_dim_v);
  }
  if (out.lse != nullptr) {
    out.lse[head * out.lse_head_stride + row * out.lse_row_stride] = lse;
  }
}

} // namespace mixedkv
