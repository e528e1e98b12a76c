#include "attention/products.h"

#include <algorithm>
#include <cstdint>
#include <cstring>

namespace mixedkv {
namespace {

/// Pairs of a row of n numbers.
std::size_t pairs_of(std::size_t n) { return (n + 1) / 2; }

std::size_t panels_of(std::size_t columns) { return (columns + kPanelColumns - 1) / kPanelColumns; }

/// Weights are written in stretches of 32, from a row's lead on.
constexpr std::size_t kLdWeights = kChunkKeys + kScoresPad + 32;

float f32_of(bf16_t x) {
  const std::uint32_t bits = static_cast<std::uint32_t>(x.bits) << 16;
  float y;
  std::memcpy(&y, &bits, sizeof y);
  return y;
}

} // namespace

std::size_t Bf16Products::scratch_floats(std::size_t head_dim, std::size_t head_dim_v) {
  const std::size_t keys = kChunkKeys + kScoresPad;
  return Scratch::line_bf16(kTileRows * 2 * pairs_of(head_dim)) +
         Scratch::line_bf16(kTileRows * kLdWeights) +
         Scratch::line_bf16(panels_of(keys) * panel_size(pairs_of(head_dim))) +
         Scratch::line_bf16(panels_of(head_dim_v) * panel_size(pairs_of(keys))) +
         Scratch::line(head_dim_v);
}

Bf16Products::Bf16Products(const ProductInputs &inputs, Scratch &scratch)
    : in_(inputs), bf16_(*inputs.kernels.bf16), ld_q_(2 * pairs_of(inputs.head_dim)),
      q_(scratch.bf16s(in_.num_rows * ld_q_)), weights_(scratch.bf16s(in_.num_rows * kLdWeights)),
      key_panels_(scratch.bf16s(panels_of(in_.scores.ld()) * panel_size(pairs_of(in_.head_dim)))),
      value_panels_(
          scratch.bf16s(panels_of(in_.head_dim_v) * panel_size(pairs_of(in_.scores.ld())))),
      value_(scratch.floats(in_.head_dim_v)) {
  for (int r = 0; r < in_.num_rows; ++r) {
    bf16_.round_row(in_.q + r * in_.head_dim, q_ + r * ld_q_, in_.head_dim);
  }
}

void Bf16Products::compute_scores(const KeyRun &run) {
  const KeySegment &segment = run.segment();
  const bool packed = segment.k_layout == Layout::tiles;
  const int d = static_cast<int>(in_.head_dim);
  const std::size_t ld = panel_size(pairs_of(in_.head_dim));
  const Rows &k = run.keys();
  int num_panels = 0;
  if (packed) {
    for (; num_panels < run.num_tiles(); ++num_panels) {
      in_.kernels.tiles_of(segment.k_format)
          ->key_panel(row_at(k, num_panels), d, key_panels_ + num_panels * ld);
    }
  } else {
    for (int j = 0; j < run.size(); j += kPanelColumns, ++num_panels) {
      const Rows part = rows_from(k, j);
      in_.kernels.of(segment.k_format)
          .key_panel(&part, std::min<int>(kPanelColumns, run.size() - j), d,
                     key_panels_ + num_panels * ld);
    }
  }
  float *x = packed ? in_.scores.by_token() : in_.scores.by_key(run);
  bf16_.product(q_, ld_q_, in_.num_rows, key_panels_, ld, static_cast<int>(pairs_of(in_.head_dim)),
                num_panels * kPanelColumns, false, x, in_.scores.ld());
  if (packed) {
    in_.scores.gather(run);
  }
}

void Bf16Products::weigh_row(const KeyRun &run, int row, int from, int to) {
  const bool packed = run.segment().v_layout == Layout::tiles;
  bf16_t *weights = weights_ + row * kLdWeights;
  const int lead = packed && !run.scattered() ? run.lead() : 0;
  const int end = packed ? run.num_tokens() : run.size() + run.size() % 2;
  const float *x = in_.scores.by_key(run) + row * in_.scores.ld();
  if (to <= from || !in_.states.raise_maximum(row, x + from, to - from)) {
    std::fill_n(weights, end, bf16_t{0});
    return;
  }
  const float m = in_.states.m(row);
  if (packed && run.scattered()) {
    bf16_t in_order[kChunkKeys + 32];
    in_.states.add_to_sum(row, bf16_.exp_sum(x + from, in_order, to - from, m));
    std::fill_n(weights, end, bf16_t{0});
    for (int j = from; j < to; ++j) {
      weights[run.slot(j)] = in_order[j - from];
    }
    return;
  }
  std::fill_n(weights, lead + from, bf16_t{0});
  in_.states.add_to_sum(row, bf16_.exp_sum(x + from, weights + lead + from, to - from, m));
  if (lead + to < end) {
    std::fill(weights + lead + to, weights + end, bf16_t{0});
  }
}

/// Values that are not finite must not meet the weight of a row that does not see them, since 0
/// times infinity is NaN: they are taken out of the panels and given to the rows that do.
void Bf16Products::take_out_not_finite(int num_keys, std::size_t ld_panel) {
  const std::size_t width = in_.head_dim_v;
  for (int j = 0; j < num_keys; ++j) {
    bf16_t *pair = value_panels_ + panel_size(j / 2) + j % 2;
    const auto value = [&](std::size_t i) -> bf16_t & {
      return pair[i / kPanelColumns * ld_panel + i % kPanelColumns * 2];
    };
    for (std::size_t i = 0; i < width; ++i) {
      value_[i] = f32_of(value(i));
    }
    if (in_.kernels.all_finite_f32(value_, width)) {
      continue;
    }
    for (int r = 0; r < in_.num_rows; ++r) {
      const float weight = f32_of(weights_[r * kLdWeights + j]);
      if (weight != 0.0f) {
        in_.kernels.axpy(weight, value_, in_.states.acc(r), width);
      }
    }
    for (std::size_t i = 0; i < width; ++i) {
      value(i) = bf16_t{0};
    }
  }
}

void Bf16Products::add_values(const KeyRun &run, bool some_hidden) {
  const KeySegment &segment = run.segment();
  const bool packed = segment.v_layout == Layout::tiles;
  const int dv = static_cast<int>(in_.head_dim_v);
  const int num_keys = packed ? run.num_tokens() : run.size();
  const std::size_t num_pairs = pairs_of(num_keys);
  const std::size_t ld = panel_size(num_pairs);
  const Rows &v = run.values();
  if (packed) {
    some_hidden |= num_keys > run.size();
    for (int t = 0; t < run.num_tiles(); ++t) {
      in_.kernels.tiles_of(segment.v_format)
          ->value_panels(row_at(v, t), dv, value_panels_ + t * panel_size(kTileTokens / 2), ld);
    }
  } else {
    in_.kernels.of(segment.v_format).value_panels(&v, run.size(), dv, value_panels_, ld);
  }
  if (some_hidden && !bf16_.all_finite(value_panels_, panels_of(in_.head_dim_v) * ld)) {
    take_out_not_finite(num_keys, ld);
  }
  in_.states.begin_sums(1);
  bf16_.product(weights_, kLdWeights, in_.num_rows, value_panels_, ld, static_cast<int>(num_pairs),
                dv, true, in_.states.acc(), in_.head_dim_v);
}

} // namespace mixedkv
