#include "cache/journal.h"

#include <algorithm>
#include <numeric>

namespace mixedkv {

Journal::Journal(const RowShape &hot, std::int64_t num_cells, std::int64_t num_kept)
    : num_kept_(num_kept), rows_(hot, num_kept), entries_(static_cast<std::size_t>(num_cells)),
      hot_cells_(entries_.size()), cold_cells_(entries_.size()) {
  std::iota(entries_.begin(), entries_.end(), 0);
}

std::size_t Journal::bytes() const {
  return rows_.bytes() + (more_rows_ ? more_rows_->bytes() : 0) +
         (entries_.capacity() + hot_cells_.capacity() + cold_cells_.capacity()) *
             sizeof(std::int32_t);
}

void Journal::reserve(std::int64_t num_moves) {
  if (num_moves > num_kept_) {
    more_rows_ = std::make_unique<RowStorage>(rows_.shape(), num_moves - num_kept_);
  }
}

void Journal::record(const Tier &hot, const std::int32_t *hot_cells, const std::int32_t *cold_cells,
                     std::int64_t n) noexcept {
  std::copy_n(hot_cells, n, hot_cells_.data() + num_moves_);
  std::copy_n(cold_cells, n, cold_cells_.data() + num_moves_);
  const std::int64_t kept = std::clamp<std::int64_t>(num_kept_ - num_moves_, 0, n);
  rows_.copy_cells(hot.rows, hot_cells, entries_.data() + num_moves_, kept);
  if (kept < n) {
    more_rows_->copy_cells(hot.rows, hot_cells + kept,
                           entries_.data() + (num_moves_ + kept - num_kept_), n - kept);
  }
  num_moves_ += n;
}

void Journal::undo(Tier &hot, Tier &cold) noexcept {
  for (std::int64_t i = 0; i < num_moves_; ++i) {
    hot.cells.put_copy(hot_cells_[i], cold.cells, cold_cells_[i]);
    cold.cells.release(cold_cells_[i]);
  }
  const std::int64_t kept = std::min(num_moves_, num_kept_);
  hot.rows.copy_cells(rows_, entries_.data(), hot_cells_.data(), kept);
  if (kept < num_moves_) {
    hot.rows.copy_cells(*more_rows_, entries_.data(), hot_cells_.data() + kept, num_moves_ - kept);
  }
  drop();
}

void Journal::drop() noexcept {
  num_moves_ = 0;
  more_rows_.reset();
}

} // namespace mixedkv
