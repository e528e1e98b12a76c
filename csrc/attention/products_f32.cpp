#include "attention/products.h"

#include <algorithm>

namespace mixedkv {

F32Products::F32Products(const ProductInputs &inputs, Scratch &scratch)
    : in_(inputs), values_(scratch.floats(inputs.scores.ld() * inputs.head_dim_v)) {
  if (few_rows()) {
    prepared_ = scratch.floats(in_.num_rows * tile_query_floats(in_.head_dim));
  } else {
    keys_ = scratch.floats(in_.scores.ld() * in_.head_dim);
  }
}

std::size_t F32Products::scratch_floats(int num_rows, int most_keys, std::size_t head_dim,
                                        std::size_t head_dim_v) {
  const std::size_t keys = static_cast<std::size_t>(most_keys) + kScoresPad;
  return Scratch::line(keys * head_dim_v) +
         Scratch::line(num_rows < kUnpackRows ? num_rows * tile_query_floats(head_dim)
                                              : keys * head_dim);
}

void F32Products::compute_scores(const KeyRun &run) {
  if (run.segment().k_layout == Layout::tiles) {
    compute_tile_scores(run);
  } else {
    compute_row_scores(run);
  }
}

void F32Products::compute_row_scores(const KeyRun &run) {
  const int d = static_cast<int>(in_.head_dim);
  const Rows &k = run.keys();
  const RowKernels &kernels = in_.kernels.of(run.segment().k_format);
  float *x = in_.scores.by_key(run);
  if (few_rows()) {
    kernels.qk(in_.q, in_.head_dim, in_.num_rows, &k, run.size(), d, x, in_.scores.ld());
    return;
  }
  int num_tiles = 0;
  for (int j = 0; j < run.size(); j += kTileTokens, ++num_tiles) {
    const Rows part = rows_from(k, j);
    kernels.transpose_keys(&part, std::min<int>(kTileTokens, run.size() - j), d,
                           keys_ + j * in_.head_dim);
  }
  in_.kernels.qk_transposed(in_.q, in_.head_dim, in_.num_rows, keys_, num_tiles, d, x,
                            in_.scores.ld());
}

void F32Products::compute_tile_scores(const KeyRun &run) {
  const int d = static_cast<int>(in_.head_dim);
  const Rows &tiles = run.keys();
  const TileKernels &kernels = *in_.kernels.tiles_of(run.segment().k_format);
  float *x = in_.scores.by_token();
  if (few_rows()) {
    if (prepared_for_ != &kernels) {
      kernels.prepare_query(in_.q, in_.head_dim, in_.num_rows, d, prepared_);
      prepared_for_ = &kernels;
    }
    kernels.qk(prepared_, in_.num_rows, &tiles, run.num_tiles(), d, x, in_.scores.ld());
  } else {
    for (int t = 0; t < run.num_tiles(); ++t) {
      kernels.keys_to_f32(row_at(tiles, t), d, keys_ + t * kTileTokens * in_.head_dim);
    }
    in_.kernels.qk_transposed(in_.q, in_.head_dim, in_.num_rows, keys_, run.num_tiles(), d, x,
                              in_.scores.ld());
  }
  in_.scores.gather(run);
}

void F32Products::weigh_row(const KeyRun &run, int row, int from, int to) {
  float *x = in_.scores.by_key(run) + row * in_.scores.ld();
  const int n = to - from;
  if (n > 0) {
    if (in_.states.raise_maximum(row, x + from, n)) {
      in_.states.add_to_sum(row, in_.kernels.exp_sum(x + from, n, in_.states.m(row)));
    } else {
      std::fill_n(x + from, n, 0.0f);
    }
  }
  std::fill(x, x + from, 0.0f);
  std::fill(x + to, x + run.size(), 0.0f);
}

/// acc += weights * n values.
void F32Products::add_rows(const RowKernels &kernels, const Rows &values, int n,
                           const float *weights) {
  in_.states.begin_sums((n + kSumKeys - 1) / kSumKeys);
  kernels.pv(weights, in_.scores.ld(), in_.num_rows, &values, n, static_cast<int>(in_.head_dim_v),
             in_.states.acc(), in_.head_dim_v);
}

/// acc += weights * the first n unpacked values.
void F32Products::add_unpacked(int n, const float *weights, bool some_hidden) {
  const std::size_t width = in_.head_dim_v;
  const std::size_t ld = in_.scores.ld();
  if (some_hidden && !in_.kernels.all_finite_f32(values_, n * width)) {
    // A weight of 0 times infinity or NaN would leak into rows that don't see the value: such
    // values are taken out of the run and given to the rows that do see them.
    for (int j = 0; j < n; ++j) {
      float *value = values_ + j * width;
      if (in_.kernels.all_finite_f32(value, width)) {
        continue;
      }
      for (int r = 0; r < in_.num_rows; ++r) {
        const float weight = weights[r * ld + j];
        if (weight != 0.0f) {
          in_.kernels.axpy(weight, value, in_.states.acc(r), width);
        }
      }
      std::fill_n(value, width, 0.0f);
    }
  }
  const Rows rows{values_, static_cast<std::ptrdiff_t>(width * sizeof(float)), nullptr};
  add_rows(in_.kernels.of(Format::f32), rows, n, weights);
}

void F32Products::add_tile_values(const KeyRun &run, bool some_hidden) {
  in_.scores.scatter(run);
  const int dv = static_cast<int>(in_.head_dim_v);
  const Rows &tiles = run.values();
  const TileKernels &kernels = *in_.kernels.tiles_of(run.segment().v_format);
  const float *weights = in_.scores.by_token();
  if (few_rows()) {
    in_.states.begin_sums((run.num_tokens() + kChunkKeys - 1) / kChunkKeys);
    kernels.pv(weights, in_.scores.ld(), in_.num_rows, &tiles, run.num_tiles(), dv,
               in_.states.acc(), in_.head_dim_v);
    return;
  }
  for (int t = 0; t < run.num_tiles(); ++t) {
    kernels.values_to_f32(row_at(tiles, t), dv, values_ + t * kTileTokens * in_.head_dim_v);
  }
  add_unpacked(run.num_tokens(), weights, some_hidden || run.num_tokens() > run.size());
}

void F32Products::add_values(const KeyRun &run, bool some_hidden) {
  const KeySegment &segment = run.segment();
  if (segment.v_layout == Layout::tiles) {
    add_tile_values(run, some_hidden);
    return;
  }
  const Rows &v = run.values();
  const RowKernels &kernels = in_.kernels.of(segment.v_format);
  const float *weights = in_.scores.by_key(run);
  if (!some_hidden && (few_rows() || segment.v_format == Format::f32)) {
    add_rows(kernels, v, run.size(), weights);
    return;
  }
  for (int j = 0; j < run.size(); ++j) {
    kernels.to_f32(row_at(v, j), values_ + j * in_.head_dim_v, in_.head_dim_v);
  }
  add_unpacked(run.size(), weights, some_hidden);
}

} // namespace mixedkv
