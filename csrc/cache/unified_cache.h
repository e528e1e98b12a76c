// One tier: cells, and the rows that the tokens in them have in every cached layer.
#pragma once

#include "cells.h"
#include "row_storage.h"

#include <cstdint>

namespace mixedkv {

/// Row i of rows belongs to cell i of cells; what a free cell's rows hold means nothing.
struct UnifiedCache {
  UnifiedCache(const RowShape &shape, std::int64_t size, int n_seq_max)
      : rows(shape, size), cells(size, n_seq_max) {}

  /// Copies tokens of another tier, or of this one, into the lowest free cells, in order: all that
  /// cells know of them, and their rows, converted where types differ. There is room for n. Writes
  /// the cells taken to to_cells.
  void take_copies(const UnifiedCache &from, const std::int32_t *from_cells, std::int64_t n,
                   std::int32_t *to_cells) noexcept;
  void release(const std::int32_t *released, std::int64_t n) noexcept;

  RowStorage rows; ///< first: what can't be had should fail before books are filled
  Cells cells;
};

} // namespace mixedkv
