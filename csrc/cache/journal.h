// What it takes to undo moves: the hot rows as they were, before quantising lost some of their
// bits, and which cell went where. The rest stands in the cold cells, which nobody may change
// while a slot is pending.
#pragma once

#include "cache/tier.h"

#include <cstddef>
#include <cstdint>
#include <memory>
#include <vector>

namespace mixedkv {

class Journal {
public:
  /// Room for num_kept moves of rows of hot's shape, for good. num_cells: of hot, the most that can
  /// ever be recorded together. Throws std::bad_alloc.
  Journal(const RowShape &hot, std::int64_t num_cells, std::int64_t num_kept);

  /// Of all that is allocated now.
  std::size_t bytes() const;

  /// Makes room for num_moves in all until undo or drop; allocates where that is more than is kept.
  /// Nothing is recorded yet. Throws std::bad_alloc, and nothing has changed then.
  void reserve(std::int64_t num_moves);
  /// Keeps the rows of tokens that were just copied from hot cells to cold ones; call it before
  /// the hot cells are used again. There is room.
  void record(const Tier &hot, const std::int32_t *hot_cells, const std::int32_t *cold_cells,
              std::int64_t n) noexcept;
  /// Puts all recorded tokens back into their hot cells, which are free, and frees the cold ones.
  void undo(Tier &hot, Tier &cold) noexcept;
  /// Forgets: the moves are final. Gives back what reserve allocated.
  void drop() noexcept;

private:
  std::int64_t num_kept_;
  RowStorage rows_;                       ///< row i: of move i, below num_kept_
  std::unique_ptr<RowStorage> more_rows_; ///< row i: of move num_kept_ + i; null: none
  std::vector<std::int32_t> entries_;     ///< 0, 1, 2, ...
  std::vector<std::int32_t> hot_cells_;   ///< of move i
  std::vector<std::int32_t> cold_cells_;  ///< of move i
  std::int64_t num_moves_ = 0;
};

} // namespace mixedkv
