// One tier: cells, and the rows that the tokens in them have in every cached layer.
#pragma once

#include "cache/books/cells.h"
#include "cache/books/placement.h"
#include "formats/token_tile.h"
#include "rows/row_storage.h"

#include <cstdint>

namespace mixedkv {

/// Row i of rows belongs to cell i of cells; what a free cell's rows hold means nothing.
struct Tier {
  Tier(const RowShape &shape, std::int64_t size, int n_seq_max)
      : rows(shape, size), cells(size, n_seq_max, rows.cells_apart() ? 1 : kTileTokens),
        placement(cells) {}

  /// Copies tokens of another tier, or of this one, into free cells: all that cells know of them,
  /// and their rows, converted where types differ. There is room for n. Writes the cells taken to
  /// to_cells. owners (words) where not null: of every copy, in place of the token's.
  void take_copies(const Tier &from, const std::int32_t *from_cells, std::int64_t n,
                   std::int32_t *to_cells, const std::uint64_t *owners = nullptr) noexcept;
  void release(const std::int32_t *released, std::int64_t n) noexcept;
  /// Puts a token into a free cell; there is one, and placement has begun.
  std::int32_t put(std::int32_t pos, std::uint64_t stamp, const std::uint64_t *owners) noexcept;

  RowStorage rows; ///< first: what can't be had should fail before books are filled
  Cells cells;
  Placement placement;
};

} // namespace mixedkv
