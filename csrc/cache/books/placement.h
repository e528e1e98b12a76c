// Which free cell a new token gets. Where attention reads cells by tiles (formats/token_tile.h), a
// tile should hold tokens of one sequence, or of one set of sequences that share them: what a query
// reads beside its own tokens costs as much as these.
#pragma once

#include "cache/books/cells.h"

#include <cstddef>
#include <cstdint>
#include <vector>

namespace mixedkv {

/// What it chooses follows from the cells as they are when begin is called and from the tokens
/// placed since; it never fails while a cell is free. Nothing here allocates but the constructor.
class Placement {
public:
  /// For cells of this size and tile. Throws std::bad_alloc.
  explicit Placement(const Cells &cells);

  /// Looks the cells over, once for any number of tokens: the tiles below cells.end(), and the
  /// cells of those that are partly filled.
  void begin(const Cells &cells) noexcept;
  /// A free cell for a token of these owners (words_per_cell() words), to be filled before the next
  /// call; there is one. In a partly filled tile of just these owners, the lowest; else in the
  /// lowest tile that is wholly free; else anywhere, in as few tiles of others as will do. Where a
  /// tile is one cell: the lowest.
  std::int32_t find(Cells &cells, const std::uint64_t *owners) noexcept;

  std::size_t bytes() const;

private:
  struct Tile {
    std::int32_t number;
    std::int32_t cell; ///< one of it that is in use, by the time it is looked at
  };

  std::vector<Tile> pure_; ///< tiles of one set of owners, by (owners, number); some may be full
  std::vector<std::int32_t> mixed_; ///< partly filled tiles of several, the last one first
  std::int32_t fresh_ = 0;          ///< no tile below is wholly free
};

} // namespace mixedkv
