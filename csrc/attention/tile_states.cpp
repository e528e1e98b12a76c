#include "attention/tile_states.h"

#include <algorithm>
#include <cstring>
#include <limits>

namespace mixedkv {

TileStates::TileStates(const Kernels &kernels, const QueryRows &rows, std::size_t head_dim_v,
                       Scratch &scratch)
    : kernels_(kernels), rows_(rows), head_dim_v_(head_dim_v),
      acc_(scratch.floats(static_cast<std::size_t>(rows.count()) * head_dim_v)) {
  for (Level &level : levels_) {
    level.acc = scratch.floats(static_cast<std::size_t>(rows.count()) * head_dim_v);
  }
  clear();
}

void TileStates::clear() {
  std::fill_n(states_, rows_.count(), RowState{kMinusInfinity, 0.0f});
  num_sums_ = 0;
  for (Level &level : levels_) {
    level.num_sums = 0;
  }
}

bool TileStates::all_finite() {
  settle();
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
    // The one place where a row's accumulators are reset.
    std::fill_n(acc(row), head_dim_v_, 0.0f);
    state.s = 0.0f;
    for (Level &level : levels_) {
      if (level.num_sums > 0) {
        std::fill_n(level_row(level, row), head_dim_v_, 0.0f);
        level.s[row] = 0.0f;
      }
    }
  } else if (state.m != m) {
    const float weight = weight_of(state.m - m);
    scale_acc(kernels_, acc(row), head_dim_v_, weight);
    state.s *= weight;
    for (Level &level : levels_) {
      if (level.num_sums > 0) {
        scale_acc(kernels_, level_row(level, row), head_dim_v_, weight);
        level.s[row] *= weight;
      }
    }
  }
  state.m = m;
  return true;
}

void TileStates::put_sums_away() {
  num_sums_ = 0;
  for (int r = 0; r < rows_.count(); ++r) {
    if (states_[r].m != kMinusInfinity) {
      add_row(levels_[0], r, acc(r), states_[r].s);
      std::fill_n(acc(r), head_dim_v_, 0.0f);
      states_[r].s = 0.0f;
    }
  }
  ++levels_[0].num_sums;
  for (int l = 0; l + 1 < kLevels && levels_[l].num_sums == kSums; ++l) {
    for (int r = 0; r < rows_.count(); ++r) {
      if (states_[r].m != kMinusInfinity) {
        add_row(levels_[l + 1], r, level_row(levels_[l], r), levels_[l].s[r]);
      }
    }
    levels_[l].num_sums = 0;
    ++levels_[l + 1].num_sums;
  }
}

void TileStates::add_row(Level &level, int row, const float *acc, float s) {
  float *to = level_row(level, row);
  if (level.num_sums == 0) {
    std::memcpy(to, acc, head_dim_v_ * sizeof(float));
    level.s[row] = s;
  } else {
    kernels_.axpy(1.0f, acc, to, head_dim_v_);
    level.s[row] += s;
  }
}

void TileStates::settle() {
  for (Level &level : levels_) {
    if (level.num_sums == 0) {
      continue;
    }
    for (int r = 0; r < rows_.count(); ++r) {
      if (states_[r].m != kMinusInfinity) {
        kernels_.axpy(1.0f, level_row(level, r), acc(r), head_dim_v_);
        states_[r].s += level.s[r];
      }
    }
    level.num_sums = 0;
    num_sums_ = 1;
  }
}

void TileStates::load(const StateView &state) {
  settle();
  for (int r = 0; r < rows_.count(); ++r) {
    const std::int64_t row = rows_.number(r);
    const float m = state.ms[2 * row];
    if (m != kMinusInfinity) {
      states_[r] = {m, state.ms[2 * row + 1]};
      std::memcpy(acc(r), state.acc + row * head_dim_v_, head_dim_v_ * sizeof(float));
      num_sums_ = 1;
    }
  }
}

void TileStates::store(const StateView &state) {
  settle();
  for (int r = 0; r < rows_.count(); ++r) {
    if (states_[r].m != kMinusInfinity) {
      const std::int64_t row = rows_.number(r);
      state.ms[2 * row] = states_[r].m;
      state.ms[2 * row + 1] = states_[r].s;
      std::memcpy(state.acc + row * head_dim_v_, acc(r), head_dim_v_ * sizeof(float));
    }
  }
}

void TileStates::store_partial(float *partial) {
  settle();
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
  settle();
  num_sums_ = 1;
  const int num_rows = rows_.count();
  const float *accs = partial + 2 * num_rows;
  for (int r = 0; r < num_rows; ++r) {
    merge_row(kernels_, states_[r], acc(r), {partial[2 * r], partial[2 * r + 1]},
              accs + r * head_dim_v_, head_dim_v_);
  }
}

void TileStates::finalize(const float *sinks, const RowTransform *transform,
                          const OutputView &out) {
  settle();
  for (int r = 0; r < rows_.count(); ++r) {
    finalize_row(states_[r], acc(r), head_dim_v_, sinks, out, rows_.head(r), rows_.query(r),
                 transform);
  }
}

} // namespace mixedkv
