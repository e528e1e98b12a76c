// The two products of a tile with a run of keys, in f32: scores, and values by their weights. Few
// rows leave the unpacking to the kernels; for many, keys or values are unpacked first.
#include "attention/query_tile.h"

#include "attention/row_runs.h"

#include <algorithm>
#include <cstring>

namespace mixedkv {

void QueryTile::compute_scores(const Chunk &chunk) {
  if (bf16_ != nullptr) {
    compute_scores_bf16(chunk);
    return;
  }
  const KeySegment &segment = chunk.segment;
  const int d = static_cast<int>(head_dim_);
  if (segment.k_layout == Layout::rows) {
    const Rows k = rows_of_head(segment.k, segment.k_head_stride, segment.k_row_stride,
                                segment.index, kv_head_, chunk.begin, chunk.n);
    const RowKernels &rows = kernels_.of(segment.k_format);
    if (num_rows_ < kUnpackRows) {
      rows.qk(q_, head_dim_, num_rows_, &k, chunk.n, d, chunk.x, ld_);
      return;
    }
    int num_tiles = 0;
    for (int j = 0; j < chunk.n; j += kTileTokens, ++num_tiles) {
      const Rows part = rows_from(k, j);
      rows.transpose_keys(&part, std::min<int>(kTileTokens, chunk.n - j), d, keys_ + j * head_dim_);
    }
    kernels_.qk_transposed(q_, head_dim_, num_rows_, keys_, num_tiles, d, chunk.x, ld_);
    return;
  }
  const TileKernels &kernels = *kernels_.tiles_of(segment.k_format);
  const Rows tiles = tiles_of(chunk, segment.k, segment.k_head_stride, segment.k_row_stride);
  if (num_rows_ < kUnpackRows) {
    if (prepared_for_ != &kernels) {
      kernels.prepare_query(q_, head_dim_, num_rows_, d, prepared_);
      prepared_for_ = &kernels;
    }
    kernels.qk(prepared_, num_rows_, &tiles, chunk.num_tiles, d, scores_, ld_);
  } else {
    for (int t = 0; t < chunk.num_tiles; ++t) {
      kernels.keys_to_f32(row_at(tiles, t), d, keys_ + t * kTileTokens * head_dim_);
    }
    kernels_.qk_transposed(q_, head_dim_, num_rows_, keys_, chunk.num_tiles, d, scores_, ld_);
  }
  gather_scores(chunk);
}

/// Scores over packed keys lie as tiles do; those of scattered keys are brought into their order.
void QueryTile::gather_scores(const Chunk &chunk) {
  if (!chunk.scattered) {
    return;
  }
  for (int r = 0; r < num_rows_; ++r) {
    const float *from = scores_ + r * ld_;
    float *to = gathered_ + r * ld_;
    for (int j = 0; j < chunk.n; ++j) {
      to[j] = from[slots_[j]];
    }
  }
}

/// acc += weights * values, f32 [n, head_dim_v]; a weight of 0 hides its value, where some_hidden
/// says that there may be such.
void QueryTile::weigh_unpacked(float *values, int n, const float *weights, bool some_hidden) {
  const std::size_t width = head_dim_v_;
  if (some_hidden && !kernels_.all_finite_f32(values, n * width)) {
    // A weight of 0 times infinity or NaN would leak into rows that don't see the value: such
    // values are taken out of the run and given to the rows that do see them.
    for (int j = 0; j < n; ++j) {
      float *value = values + j * width;
      if (kernels_.all_finite_f32(value, width)) {
        continue;
      }
      for (int r = 0; r < num_rows_; ++r) {
        const float weight = weights[r * ld_ + j];
        if (weight != 0.0f) {
          kernels_.axpy(weight, value, acc(r), width);
        }
      }
      std::fill_n(value, width, 0.0f);
    }
  }
  const Rows rows{values, static_cast<std::ptrdiff_t>(width * sizeof(float)), nullptr};
  kernels_.of(Format::f32)
      .pv(weights, ld_, num_rows_, &rows, n, static_cast<int>(width), acc_, width);
}

void QueryTile::weigh_packed_values(const Chunk &chunk, bool some_hidden) {
  const KeySegment &segment = chunk.segment;
  const int num_tokens = chunk.num_tiles * kTileTokens;
  for (int r = 0; r < num_rows_; ++r) {
    float *weights = scores_ + r * ld_;
    if (chunk.scattered) {
      const float *from = gathered_ + r * ld_;
      std::fill_n(weights, num_tokens, 0.0f);
      for (int j = 0; j < chunk.n; ++j) {
        weights[slots_[j]] = from[j];
      }
    } else {
      std::fill_n(weights, chunk.lead, 0.0f);
      std::fill(weights + chunk.lead + chunk.n, weights + num_tokens, 0.0f);
    }
  }
  const int dv = static_cast<int>(head_dim_v_);
  const TileKernels &kernels = *kernels_.tiles_of(segment.v_format);
  const Rows tiles = tiles_of(chunk, segment.v, segment.v_head_stride, segment.v_row_stride);
  if (num_rows_ < kUnpackRows) {
    kernels.pv(scores_, ld_, num_rows_, &tiles, chunk.num_tiles, dv, acc_, head_dim_v_);
    return;
  }
  for (int t = 0; t < chunk.num_tiles; ++t) {
    kernels.values_to_f32(row_at(tiles, t), dv, values_ + t * kTileTokens * head_dim_v_);
  }
  weigh_unpacked(values_, num_tokens, scores_, some_hidden || num_tokens > chunk.n);
}

void QueryTile::weigh_values(const Chunk &chunk, bool some_hidden) {
  if (bf16_ != nullptr) {
    weigh_values_bf16(chunk, some_hidden);
    return;
  }
  const KeySegment &segment = chunk.segment;
  if (segment.v_layout == Layout::tiles) {
    weigh_packed_values(chunk, some_hidden);
    return;
  }
  const Rows v = rows_of_head(segment.v, segment.v_head_stride, segment.v_row_stride, segment.index,
                              kv_head_, chunk.begin, chunk.n);
  if (!some_hidden && (num_rows_ < kUnpackRows || segment.v_format == Format::f32)) {
    kernels_.of(segment.v_format)
        .pv(chunk.x, ld_, num_rows_, &v, chunk.n, static_cast<int>(head_dim_v_), acc_, head_dim_v_);
    return;
  }
  for (int j = 0; j < chunk.n; ++j) {
    kernels_.of(segment.v_format).to_f32(row_at(v, j), values_ + j * head_dim_v_, head_dim_v_);
  }
  weigh_unpacked(values_, chunk.n, chunk.x, some_hidden);
}

} // namespace mixedkv
