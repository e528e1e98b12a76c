// Which tokens may leave hot, and which of them go first. Metadata only.
#pragma once

#include "cache/books/cells.h"

#include <cstddef>
#include <cstdint>
#include <vector>

namespace mixedkv {

class Movable {
public:
  /// Positions below sink_tokens never leave hot. num_cells: of hot; 0 where nothing is ever
  /// picked. Throws std::bad_alloc.
  Movable(int sink_tokens, std::int64_t num_cells)
      : sink_tokens_(sink_tokens), picked_(static_cast<std::size_t>(num_cells)) {}

  /// Committed tokens that are not pinned.
  std::int64_t count(const Cells &hot) const;
  /// The cells of the n oldest of them, of which there are as many, in the order in which they
  /// take cold cells. Valid until the next call.
  const std::int32_t *pick(const Cells &hot, std::int64_t n) noexcept;

  std::size_t bytes() const { return picked_.capacity() * sizeof(std::int32_t); }

private:
  bool may_move(const Cells &hot, std::int32_t cell) const {
    return hot.committed(cell) && hot.pos(cell) >= sink_tokens_;
  }

  int sink_tokens_;
  std::vector<std::int32_t> picked_; ///< [num_cells], so that pick allocates nothing
};

} // namespace mixedkv
