#include "cache/books/cells.h"

#include <algorithm>

namespace mixedkv {

Cells::Cells(std::int64_t size, int n_seq_max, int tile_cells)
    : n_seq_max_(n_seq_max), tile_cells_(tile_cells),
      words_((static_cast<std::size_t>(n_seq_max) + 63) / 64),
      pos_(static_cast<std::size_t>(size), -1), stamp_(static_cast<std::size_t>(size), 0),
      owners_(static_cast<std::size_t>(size) * words_, 0),
      used_in_(static_cast<std::size_t>((size + tile_cells - 1) / tile_cells), 0) {}

std::int32_t Cells::lowest_free_in(std::int32_t tile) const {
  std::int32_t cell = first_of(tile);
  while (in_use(cell)) {
    ++cell;
  }
  return cell;
}

bool Cells::shared(std::int32_t cell) const {
  const std::uint64_t *words = owners(cell);
  bool one = false;
  for (std::size_t w = 0; w < words_; ++w) {
    if (words[w] == 0) {
      continue;
    }
    if (one || (words[w] & (words[w] - 1)) != 0) {
      return true;
    }
    one = true;
  }
  return false;
}

std::int64_t Cells::collect(int seq, std::int64_t low, std::int64_t high, bool with_pending,
                            std::int32_t *cells, std::int32_t *positions) const {
  const std::uint64_t bit = std::uint64_t{1} << (seq % 64);
  const std::uint64_t *word = owners_.data() + seq / 64;
  const bool none_left_out = with_pending || num_pending_ == 0;
  std::int64_t n = 0;
  // Every cell is written down and only those that count are kept: owners alternate from cell to
  // cell where sequences grow side by side, and a branch would be mispredicted half the time. A
  // kept entry never lies above the number of cells in use, so the others need no more room than
  // one entry: they stop where all cells in use were met.
  const std::int64_t room = num_used_;
  for (std::int32_t cell = 0; cell < end_ && n < room; ++cell, word += words_) {
    const std::int32_t p = pos_[cell];
    cells[n] = cell;
    positions[n] = p;
    n += ((*word & bit) != 0) & (p >= low) & (p <= high) &
         (none_left_out | (stamp_[cell] != kPendingStamp));
  }
  return n;
}

bool Cells::older(std::int32_t a, std::int32_t b) const {
  if (stamp_[a] != stamp_[b]) {
    return stamp_[a] < stamp_[b];
  }
  if (pos_[a] != pos_[b]) {
    return pos_[a] < pos_[b];
  }
  const std::uint64_t *of_a = owners(a);
  const std::uint64_t *of_b = owners(b);
  const auto differ = std::mismatch(of_a, of_a + words_, of_b);
  return differ.first != of_a + words_ ? *differ.first < *differ.second : a < b;
}

std::size_t Cells::bytes() const {
  return pos_.capacity() * sizeof(pos_[0]) + stamp_.capacity() * sizeof(stamp_[0]) +
         owners_.capacity() * sizeof(owners_[0]) + used_in_.capacity() * sizeof(used_in_[0]);
}

void Cells::occupy(std::int32_t cell, std::int32_t pos, std::uint64_t stamp) {
  pos_[cell] = pos;
  stamp_[cell] = stamp;
  ++num_used_;
  ++used_in_[tile_of(cell)];
  num_pending_ += stamp == kPendingStamp;
  end_ = std::max(end_, cell + 1);
}

std::int32_t Cells::lowest_free() {
  while (in_use(first_free_)) {
    ++first_free_;
  }
  return first_free_;
}

void Cells::put(std::int32_t cell, std::int32_t pos, std::uint64_t stamp,
                const std::uint64_t *words) {
  occupy(cell, pos, stamp);
  std::copy_n(words, words_, owners_.data() + cell * words_);
}

void Cells::put_copy(std::int32_t cell, const Cells &from, std::int32_t from_cell) {
  occupy(cell, from.pos_[from_cell], from.stamp_[from_cell]);
  std::copy_n(from.owners(from_cell), words_, owners_.data() + cell * words_);
}

void Cells::release(std::int32_t cell) {
  num_pending_ -= pending(cell);
  --num_used_;
  --used_in_[tile_of(cell)];
  pos_[cell] = -1;
  stamp_[cell] = 0;
  std::fill_n(owners_.data() + cell * words_, words_, 0);
  first_free_ = std::min(first_free_, cell);
  while (end_ > 0 && !in_use(end_ - 1)) {
    --end_;
  }
}

void Cells::set_stamp(std::int32_t cell, std::uint64_t stamp) {
  num_pending_ -= pending(cell);
  stamp_[cell] = stamp;
  num_pending_ += pending(cell);
}

void Cells::add_owner(std::int32_t cell, int seq) {
  owners_[cell * words_ + seq / 64] |= std::uint64_t{1} << (seq % 64);
}

void Cells::remove_owner(std::int32_t cell, int seq) {
  std::uint64_t *words = owners_.data() + cell * words_;
  words[seq / 64] &= ~(std::uint64_t{1} << (seq % 64));
  if (std::all_of(words, words + words_, [](std::uint64_t w) { return w == 0; })) {
    release(cell);
  }
}

void Cells::set_owners(std::int32_t cell, const std::uint64_t *words) {
  std::copy_n(words, words_, owners_.data() + cell * words_);
  if (std::all_of(words, words + words_, [](std::uint64_t w) { return w == 0; })) {
    release(cell);
  }
}

void Cells::set_only_owner(std::int32_t cell, int seq) {
  std::fill_n(owners_.data() + cell * words_, words_, 0);
  add_owner(cell, seq);
}

void Cells::clear() {
  std::fill(pos_.begin(), pos_.end(), -1);
  std::fill(stamp_.begin(), stamp_.end(), 0);
  std::fill(owners_.begin(), owners_.end(), 0);
  std::fill(used_in_.begin(), used_in_.end(), 0);
  num_used_ = 0;
  num_pending_ = 0;
  first_free_ = 0;
  end_ = 0;
}

} // namespace mixedkv
