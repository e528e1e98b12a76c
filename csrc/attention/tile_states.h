// The states of a tile's query rows while it walks over keys.
#pragma once

#include "attention/query_rows.h"
#include "attention/state.h"

#include <cstddef>

namespace mixedkv {

class TileStates {
public:
  /// Empty states; acc: floats [rows.count(), head_dim_v]. rows outlives this.
  TileStates(const Kernels &kernels, const QueryRows &rows, std::size_t head_dim_v, float *acc);

  /// All become empty.
  void clear();
  /// Whether the accumulators of all rows that have seen a key are.
  bool all_finite() const;

  std::size_t head_dim_v() const { return head_dim_v_; }
  /// The accumulators, row by row, to which products add weighed values.
  float *acc() { return acc_; }
  float *acc(int row) { return acc_ + static_cast<std::size_t>(row) * head_dim_v_; }
  float m(int row) const { return states_[row].m; }
  void add_to_sum(int row, float sum) { states_[row].s += sum; }
  /// Takes the largest of n logits into the row's state; false where none of them is to be weighed.
  bool raise_maximum(int row, const float *x, int n);

  void load(const StateView &state);
  /// Writes back the rows that have seen a key; the others stay as they were, bytes and all.
  void store(const StateView &state) const;
  /// Partial states in transit: (M, S) pairs, then accumulators.
  void store_partial(float *partial) const;
  void merge_partial(const float *partial);
  static std::size_t partial_floats(int num_rows, int head_dim_v) {
    return static_cast<std::size_t>(num_rows) * (2 + static_cast<std::size_t>(head_dim_v));
  }
  /// transform: what values were changed by, or null.
  void finalize(const float *sinks, const RowTransform *transform, const OutputView &out) const;

private:
  const float *acc(int row) const { return acc_ + static_cast<std::size_t>(row) * head_dim_v_; }

  const Kernels &kernels_;
  const QueryRows &rows_;
  std::size_t head_dim_v_;
  float *acc_;
  RowState states_[kTileRows];
};

} // namespace mixedkv
