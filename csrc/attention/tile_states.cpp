#include "attention/tile_states.h"

#include <algorithm>
#include <cstring>
#include <limits>

namespace mixedkv {

TileStates::TileStates(const Kernels &kernels, const QueryRows &rows, std::size_t head_dim_v,
                       float *acc)
    : kernels_(kernels), rows_(rows), head_dim_v_(head_dim_v), acc_(acc) {
  clear();
}

void TileStates::clear() { std::fill_n(states_, rows_.count(), RowState{kMinusInfinity, 0.0f}); }

bool TileStates::all_finite() const {
  for (int r = 0; r < rows_.count(); ++r) {
    if (states_[r].m != kMinusInfinity && !kernels_.all_finite_f32(acc(r), head_dim_v_)) {
      return false;
    }
  }
  return true;
}

bool TileStates::raise_maximum(int row, const float *x, int n) {
  RowState &state = states_[row];
  const float largest = kernels_.row_max(x, n);
  const float m = state.m > largest ? state.m : largest;
  if (!(m > kMinusInfinity && m < std::numeric_limits<float>::infinity())) {
    // Nothing visible so far, or something that is not a number: rare, and told apart here.
    const bool nothing = state.m == kMinusInfinity &&
                         std::all_of(x, x + n, [](float v) { return v == kMinusInfinity; });
    if (!nothing) {
      constexpr float nan = std::numeric_limits<float>::quiet_NaN();
      state = {nan, nan};
      std::fill_n(acc(row), head_dim_v_, nan);
    }
    return false;
  }
  if (state.m == kMinusInfinity) {
    std::fill_n(acc(row), head_dim_v_, 0.0f); // the one place where an accumulator is reset
    state.s = 0.0f;
  } else if (state.m != m) {
    const float weight = weight_of(state.m - m);
    scale_acc(kernels_, acc(row), head_dim_v_, weight);
    state.s *= weight;
  }
  state.m = m;
  return true;
}

void TileStates::load(const StateView &state) {
  for (int r = 0; r < rows_.count(); ++r) {
    const std::int64_t row = rows_.number(r);
    const float m = state.ms[2 * row];
    if (m != kMinusInfinity) {
      states_[r] = {m, state.ms[2 * row + 1]};
      std::memcpy(acc(r), state.acc + row * head_dim_v_, head_dim_v_ * sizeof(float));
    }
  }
}

void TileStates::store(const StateView &state) const {
  for (int r = 0; r < rows_.count(); ++r) {
    if (states_[r].m != kMinusInfinity) {
      const std::int64_t row = rows_.number(r);
      state.ms[2 * row] = states_[r].m;
      state.ms[2 * row + 1] = states_[r].s;
      std::memcpy(state.acc + row * head_dim_v_, acc(r), head_dim_v_ * sizeof(float));
    }
  }
}

void TileStates::store_partial(float *partial) const {
  const int num_rows = rows_.count();
  float *accs = partial + 2 * num_rows;
  for (int r = 0; r < num_rows; ++r) {
    partial[2 * r] = states_[r].m;
    partial[2 * r + 1] = states_[r].s;
    if (states_[r].m != kMinusInfinity) {
      std::memcpy(accs + r * head_dim_v_, acc(r), head_dim_v_ * sizeof(float));
    }
  }
}

void TileStates::merge_partial(const float *partial) {
  const int num_rows = rows_.count();
  const float *accs = partial + 2 * num_rows;
  for (int r = 0; r < num_rows; ++r) {
    merge_row(kernels_, states_[r], acc(r), {partial[2 * r], partial[2 * r + 1]},
              accs + r * head_dim_v_, head_dim_v_);
  }
}

void TileStates::finalize(const float *sinks, const RowTransform *transform,
                          const OutputView &out) const {
  for (int r = 0; r < rows_.count(); ++r) {
    finalize_row(states_[r], acc(r), head_dim_v_, sinks, out, rows_.head(r), rows_.query(r),
                 transform);
  }
}

} // namespace mixedkv
