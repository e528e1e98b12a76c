// The two products of a tile's query rows with a run of keys: scores, and values by their weights.
// A tile picks one of these when it is made.
#pragma once

#include "attention/key_run.h"
#include "attention/scores.h"
#include "attention/sizes.h"
#include "attention/tile_states.h"
#include "kernels/kernels.h"

#include <cstddef>

namespace mixedkv {

/// What products work on; all outlive them.
struct ProductInputs {
  const Kernels &kernels;
  int num_rows;
  std::size_t head_dim;
  std::size_t head_dim_v;
  const float *q; ///< [num_rows, head_dim], scaled
  TileStates &states;
  Scores &scores;
};

/// For each run: compute_scores; weigh_row for every row, once its logits are final; then
/// add_values.
class Products {
public:
  virtual ~Products() = default;
  /// Logits of all rows with all keys of the run, to scores.by_key.
  virtual void compute_scores(const KeyRun &run) = 0;
  /// Makes weights of a row's logits of keys [from, to) and takes them into its M and S; other keys
  /// weigh 0.
  virtual void weigh_row(const KeyRun &run, int row, int from, int to) = 0;
  /// Adds values by their weights to the rows' accumulators. A weight of 0 hides its value, where
  /// some_hidden says that there may be such.
  virtual void add_values(const KeyRun &run, bool some_hidden) = 0;
};

/// In f32. Few rows leave the unpacking to the kernels; for many, keys or values are unpacked
/// first.
class F32Products final : public Products {
public:
  F32Products(const ProductInputs &inputs, Scratch &scratch);
  static std::size_t scratch_floats(int num_rows, int most_keys, std::size_t head_dim,
                                    std::size_t head_dim_v);

  void compute_scores(const KeyRun &run) override;
  void weigh_row(const KeyRun &run, int row, int from, int to) override;
  void add_values(const KeyRun &run, bool some_hidden) override;

private:
  void compute_row_scores(const KeyRun &run);
  void compute_tile_scores(const KeyRun &run);
  void add_tile_values(const KeyRun &run, bool some_hidden);
  void add_rows(const RowKernels &kernels, const Rows &values, int n, const float *weights);
  void add_unpacked(int n, const float *weights, bool some_hidden);
  bool few_rows() const { return in_.num_rows < kUnpackRows; }

  const ProductInputs in_;
  float *values_;             ///< [most_keys + kScoresPad, head_dim_v]: a run of values, unpacked
  float *keys_ = nullptr;     ///< for many rows: tiles of keys side by side
  float *prepared_ = nullptr; ///< for few: queries as qk of tiles takes them, filled when needed
  const TileKernels *prepared_for_ = nullptr; ///< whose form prepared_ has
};

/// In bf16: queries, a run's keys and values, and the weights are rounded to it; scores and
/// everything made from them, and the accumulators, are f32 as ever. S is summed from the rounded
/// weights, so that weights divided by S still add up to 1: their errors then only count against
/// how much values differ from the result, and not against their size.
class Bf16Products final : public Products {
public:
  /// kernels.bf16 is not null.
  Bf16Products(const ProductInputs &inputs, Scratch &scratch);
  static std::size_t scratch_floats(std::size_t head_dim, std::size_t head_dim_v);

  void compute_scores(const KeyRun &run) override;
  void weigh_row(const KeyRun &run, int row, int from, int to) override;
  void add_values(const KeyRun &run, bool some_hidden) override;

private:
  void take_out_not_finite(int num_keys, std::size_t ld_panel);

  const ProductInputs in_;
  const Bf16Kernels &bf16_;
  std::size_t ld_q_;
  bf16_t *q_;       ///< [num_rows, ld_q]
  bf16_t *weights_; ///< of values as these lie in their panels
  bf16_t *key_panels_;
  bf16_t *value_panels_;
  float *value_; ///< [head_dim_v]: one value as f32
};

} // namespace mixedkv
