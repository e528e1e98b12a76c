// Kernels for arithmetic in bf16: products of values rounded to bf16 (8 bits of mantissa, the
// exponent of an f32), added up in f32. A table of its own, which not every instruction set has.
//
// A panel holds a matrix as such instructions take it: 16 columns, whose numbers lie in pairs,
// [pair][column][2]. Keys of a panel are columns, pairs are of dims; values have dims for columns,
// pairs are of keys, and panel by panel covers all dims.
//
// Numbers below the smallest normal one may count as zeros, on their way in and out. Rounding is to
// nearest even, NaN stays NaN.
#pragma once

#include "formats/token_tile.h"

namespace mixedkv {

enum : int { kPanelColumns = kTileTokens };

/// Numbers in a panel of that many pairs.
static constexpr std::size_t panel_size(std::size_t num_pairs) {
  return num_pairs * 2 * kPanelColumns;
}

struct Bf16Kernels {
  /// y = x rounded, n values, then zeros up to a multiple of 2.
  void (*round_row)(const float *x, bf16_t *y, std::size_t n) noexcept;

  /// p_j = exp(x_j - m) rounded, and returns the sum of what was rounded, so that weights divided
  /// by it still add up to 1. m finite; x_j <= m or NaN; exp(-inf) is exactly 0. Before rounding
  /// the relative error is below 2e-5. p has room for a multiple of 32 values: zeros may follow.
  float (*exp_sum)(const float *x, bf16_t *p, std::size_t n, float m) noexcept;

  bool (*all_finite)(const bf16_t *x, std::size_t n) noexcept;

  /// c[r * ld_c + j] = sum over i < 2 * num_pairs, in their order, of a[r * ld_a + i] times number
  /// i of column j, for j < num_columns; where `add`, the sum is added to what c held.
  void (*product)(const bf16_t *a, std::size_t ld_a, int num_rows, const bf16_t *panels,
                  std::size_t ld_panel, int num_pairs, int num_columns, bool add, float *c,
                  std::size_t ld_c) noexcept;
};

} // namespace mixedkv
