// The states of a tile's query rows while it walks over keys.
//
// A sum of n terms in one f32 may be off by n / 2 roundings. So kernels sum kSumKeys keys at a time
// and add that to acc, kSums of which are added to the level above, and so on: where no weight is
// rounded (rows; token tiles round more than that), sums are off by some
// (kSumKeys + 2 * kSums + keys / 2^17) / 2 roundings, 6e-6 of their size at a million keys. All
// levels of a row are relative to the same M.
#pragma once

#include "attention/query_rows.h"
#include "attention/state.h"

#include <cstddef>

namespace mixedkv {

class TileStates {
public:
  /// Empty states. rows outlives this.
  TileStates(const Kernels &kernels, const QueryRows &rows, std::size_t head_dim_v,
             Scratch &scratch);
  static std::size_t scratch_floats(int num_rows, std::size_t head_dim_v) {
    return (1 + kLevels) * Scratch::line(static_cast<std::size_t>(num_rows) * head_dim_v);
  }

  /// All become empty.
  void clear();
  /// Whether the accumulators of all rows that have seen a key are.
  bool all_finite();

  std::size_t head_dim_v() const { return head_dim_v_; }
  /// Before kernels add so many sums to acc: makes room for them.
  void begin_sums(int num_sums) {
    if (num_sums_ + num_sums > kSums) {
      put_sums_away();
    }
    num_sums_ += num_sums;
  }
  /// The accumulators, row by row, to which products add sums of weighed values.
  float *acc() { return acc_; }
  float *acc(int row) { return acc_ + static_cast<std::size_t>(row) * head_dim_v_; }
  float m(int row) const { return states_[row].m; }
  void add_to_sum(int row, float sum) { states_[row].s += sum; }
  /// Takes the largest of n logits into the row's state; false where none of them is to be weighed.
  bool raise_maximum(int row, const float *x, int n);

  void load(const StateView &state);
  /// Writes back the rows that have seen a key; the others stay as they were, bytes and all.
  void store(const StateView &state);
  /// Partial states in transit: (M, S) pairs, then accumulators.
  void store_partial(float *partial);
  void merge_partial(const float *partial);
  static std::size_t partial_floats(int num_rows, int head_dim_v) {
    return static_cast<std::size_t>(num_rows) * (2 + static_cast<std::size_t>(head_dim_v));
  }
  /// transform: what values were changed by, or null.
  void finalize(const float *sinks, const RowTransform *transform, const OutputView &out);

private:
  enum : int {
    kSums = 32,  ///< in acc, and of a level in one of the next
    kLevels = 2, ///< above acc: 1024 sums (131,072 keys), all of them
  };
  /// What acc has come to, of the rows that have seen a key; the others' are anything.
  struct Level {
    int num_sums = 0;   ///< added up in it; 0: it holds nothing
    float *acc;         ///< [rows, head_dim_v]
    float s[kTileRows]; ///< of the rows
  };

  void put_sums_away();
  void add_row(Level &level, int row, const float *acc, float s);
  /// Adds all levels up in acc and S, which is where states are read and written.
  void settle();
  float *level_row(Level &level, int row) {
    return level.acc + static_cast<std::size_t>(row) * head_dim_v_;
  }

  const Kernels &kernels_;
  const QueryRows &rows_;
  std::size_t head_dim_v_;
  float *acc_;
  RowState states_[kTileRows]; ///< M, and S of what acc holds
  int num_sums_ = 0;           ///< in acc
  Level levels_[kLevels];
};

} // namespace mixedkv
