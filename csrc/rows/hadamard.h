// The rotation of rows: a Walsh-Hadamard transform spreads what a few large dims hold over all of
// them, so that blocks with a scale of their own lose less in quantisation.
#pragma once

#include "mixedkv/row_transform.h"

#include <cstddef>

namespace mixedkv {

/// Values that are rotated together in a row of n: the largest power of two that divides n. Block
/// after block of a row is; an odd n leaves rows as they are.
constexpr std::size_t hadamard_block(std::size_t n) { return n & (~n + 1); }

/// Normalised, so that products of rows stay, and its own inverse. The same bits on every
/// instruction set. A NaN or an infinity makes all of its block not finite.
class Hadamard final : public RowTransform {
public:
  void apply(float *row, std::size_t n) const noexcept override;
  void undo(float *row, std::size_t n) const noexcept override { apply(row, n); }
};

} // namespace mixedkv
