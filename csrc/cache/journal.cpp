#include "cache/journal.h"

#include <algorithm>
#include <numeric>

namespace mixedkv {

Journal::Journal(const RowShape &hot, std::int64_t num_cells)
    : rows_(hot, num_cells), entries_(static_cast<std::size_t>(num_cells)),
      hot_cells_(entries_.size()), cold_cells_(entries_.size()) {
  std::iota(entries_.begin(), entries_.end(), 0);
}

std::size_t Journal::bytes() const {
  return rows_.bytes() + (entries_.capacity() + hot_cells_.capacity() + cold_cells_.capacity()) *
                             sizeof(std::int32_t);
}

void Journal::record(const Tier &hot, const std::int32_t *hot_cells, const std::int32_t *cold_cells,
                     std::int64_t n) noexcept {
  std::copy_n(hot_cells, n, hot_cells_.data() + num_moves_);
  std::copy_n(cold_cells, n, cold_cells_.data() + num_moves_);
  rows_.copy_cells(hot.rows, hot_cells, entries_.data() + num_moves_, n);
  num_moves_ += n;
}

void Journal::undo(Tier &hot, Tier &cold) noexcept {
  for (std::int64_t i = 0; i < num_moves_; ++i) {
    hot.cells.put_copy(hot_cells_[i], cold.cells, cold_cells_[i]);
    cold.cells.release(cold_cells_[i]);
  }
  hot.rows.copy_cells(rows_, entries_.data(), hot_cells_.data(), num_moves_);
  num_moves_ = 0;
}

} // namespace mixedkv
