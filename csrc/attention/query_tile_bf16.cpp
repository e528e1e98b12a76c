// A tile whose products are in bf16: queries, a chunk's keys and values, and the weights are
// rounded to it; scores and everything made from them, and the accumulators, are f32 as ever. S is
// summed from the rounded weights, so that weights divided by S still add up to 1: their errors
// then only count against how much values differ from the result, and not against their size.
#include "attention/query_tile.h"
#include "attention/row_runs.h"

#include <algorithm>
#include <cstring>

namespace mixedkv {
namespace {

/// Pairs of a row of n numbers.
std::size_t pairs_of(std::size_t n) { return (n + 1) / 2; }

std::size_t panels_of(std::size_t columns) { return (columns + kPanelColumns - 1) / kPanelColumns; }

/// Floats that so many bf16 take, in whole cache lines.
std::size_t floats_of(std::size_t bf16s) { return (bf16s / 2 + 16) / 16 * 16; }

/// Weights are written in stretches of 32, from a row's lead on.
constexpr std::size_t kLdWeights = kChunkKeys + kScoresPad + 32;

float f32_of(bf16_t x) {
  const std::uint32_t bits = static_cast<std::uint32_t>(x.bits) << 16;
  float y;
  std::memcpy(&y, &bits, sizeof y);
  return y;
}

} // namespace

std::size_t QueryTile::bf16_scratch_floats(std::size_t head_dim, std::size_t head_dim_v) {
  const std::size_t keys = kChunkKeys + kScoresPad;
  return floats_of(kTileRows * 2 * pairs_of(head_dim)) + floats_of(kTileRows * kLdWeights) +
         floats_of(panels_of(keys) * panel_size(pairs_of(head_dim))) +
         floats_of(panels_of(head_dim_v) * panel_size(pairs_of(keys)));
}

void QueryTile::take_bf16(float *&scratch) {
  auto take = [&scratch](std::size_t n) {
    bf16_t *part = reinterpret_cast<bf16_t *>(scratch);
    scratch += floats_of(n);
    return part;
  };
  ld_q_bf16_ = 2 * pairs_of(head_dim_);
  q_bf16_ = take(num_rows_ * ld_q_bf16_);
  weights_bf16_ = take(num_rows_ * kLdWeights);
  key_panels_ = take(panels_of(ld_) * panel_size(pairs_of(head_dim_)));
  value_panels_ = take(panels_of(head_dim_v_) * panel_size(pairs_of(ld_)));
  for (int r = 0; r < num_rows_; ++r) {
    bf16_->round_row(q_ + r * head_dim_, q_bf16_ + r * ld_q_bf16_, head_dim_);
  }
}

void QueryTile::compute_scores_bf16(const Chunk &chunk) {
  const KeySegment &segment = chunk.segment;
  const int d = static_cast<int>(head_dim_);
  const std::size_t ld = panel_size(pairs_of(head_dim_));
  int num_panels = 0;
  if (segment.k_layout == Layout::tiles) {
    const Rows tiles = tiles_of(chunk, segment.k, segment.k_head_stride, segment.k_row_stride);
    for (; num_panels < chunk.num_tiles; ++num_panels) {
      kernels_.tiles_of(segment.k_format)
          ->key_panel(row_at(tiles, num_panels), d, key_panels_ + num_panels * ld);
    }
  } else {
    const Rows k = rows_of_head(segment.k, segment.k_head_stride, segment.k_row_stride,
                                segment.index, kv_head_, chunk.begin, chunk.n);
    for (int j = 0; j < chunk.n; j += kPanelColumns, ++num_panels) {
      const Rows part = rows_from(k, j);
      kernels_.of(segment.k_format)
          .key_panel(&part, std::min<int>(kPanelColumns, chunk.n - j), d,
                     key_panels_ + num_panels * ld);
    }
  }
  float *scores = segment.k_layout == Layout::tiles ? scores_ : chunk.x;
  bf16_->product(q_bf16_, ld_q_bf16_, num_rows_, key_panels_, ld,
                 static_cast<int>(pairs_of(head_dim_)), num_panels * kPanelColumns, false, scores,
                 ld_);
  if (segment.k_layout == Layout::tiles) {
    gather_scores(chunk);
  }
}

/// Row's logits of keys [from, to) of the chunk become weights, the others' are 0.
void QueryTile::softmax_row_bf16(const Chunk &chunk, int row, int from, int to) {
  const bool packed = chunk.segment.v_layout == Layout::tiles;
  bf16_t *weights = weights_bf16_ + row * kLdWeights;
  const int lead = packed && !chunk.scattered ? chunk.lead : 0;
  const int end = packed ? chunk.num_tiles * kTileTokens : chunk.n + chunk.n % 2;
  const float *x = chunk.x + row * ld_;
  if (to <= from || !raise_maximum(row, x + from, to - from)) {
    std::fill_n(weights, end, bf16_t{0});
    return;
  }
  RowState &state = states_[row];
  if (packed && chunk.scattered) {
    bf16_t in_order[kChunkKeys + 32];
    state.s += bf16_->exp_sum(x + from, in_order, to - from, state.m);
    std::fill_n(weights, end, bf16_t{0});
    for (int j = from; j < to; ++j) {
      weights[slots_[j]] = in_order[j - from];
    }
    return;
  }
  std::fill_n(weights, lead + from, bf16_t{0});
  state.s += bf16_->exp_sum(x + from, weights + lead + from, to - from, state.m);
  if (lead + to < end) {
    std::fill(weights + lead + to, weights + end, bf16_t{0});
  }
}

/// Values that are not finite must not meet the weight of a row that does not see them, since 0
/// times infinity is NaN: they are taken out of the panels and given to the rows that do.
void QueryTile::take_out_not_finite(int num_keys, std::size_t ld_panel) {
  for (int j = 0; j < num_keys; ++j) {
    bf16_t *pair = value_panels_ + panel_size(j / 2) + j % 2;
    const auto value = [&](std::size_t i) -> bf16_t & {
      return pair[i / kPanelColumns * ld_panel + i % kPanelColumns * 2];
    };
    for (std::size_t i = 0; i < head_dim_v_; ++i) {
      values_[i] = f32_of(value(i));
    }
    if (kernels_.all_finite_f32(values_, head_dim_v_)) {
      continue;
    }
    for (int r = 0; r < num_rows_; ++r) {
      const float weight = f32_of(weights_bf16_[r * kLdWeights + j]);
      if (weight != 0.0f) {
        kernels_.axpy(weight, values_, acc(r), head_dim_v_);
      }
    }
    for (std::size_t i = 0; i < head_dim_v_; ++i) {
      value(i) = bf16_t{0};
    }
  }
}

void QueryTile::weigh_values_bf16(const Chunk &chunk, bool some_hidden) {
  const KeySegment &segment = chunk.segment;
  const int dv = static_cast<int>(head_dim_v_);
  int num_keys = chunk.n;
  if (segment.v_layout == Layout::tiles) {
    num_keys = chunk.num_tiles * kTileTokens;
    some_hidden |= num_keys > chunk.n;
  }
  const std::size_t num_pairs = pairs_of(num_keys);
  const std::size_t ld = panel_size(num_pairs);
  if (segment.v_layout == Layout::tiles) {
    const Rows tiles = tiles_of(chunk, segment.v, segment.v_head_stride, segment.v_row_stride);
    for (int t = 0; t < chunk.num_tiles; ++t) {
      kernels_.tiles_of(segment.v_format)
          ->value_panels(row_at(tiles, t), dv, value_panels_ + t * panel_size(kTileTokens / 2), ld);
    }
  } else {
    const Rows v = rows_of_head(segment.v, segment.v_head_stride, segment.v_row_stride,
                                segment.index, kv_head_, chunk.begin, chunk.n);
    kernels_.of(segment.v_format).value_panels(&v, chunk.n, dv, value_panels_, ld);
  }
  if (some_hidden && !bf16_->all_finite(value_panels_, panels_of(head_dim_v_) * ld)) {
    take_out_not_finite(num_keys, ld);
  }
  bf16_->product(weights_bf16_, kLdWeights, num_rows_, value_panels_, ld,
                 static_cast<int>(num_pairs), dv, true, acc_, head_dim_v_);
}

} // namespace mixedkv
