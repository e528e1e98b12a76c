// The books of one tier: which cells are in use, and the position, age and owners of the token in
// each. No rows, no types: metadata only.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <vector>

namespace mixedkv {

/// The age stamp of a token that is not committed yet.
constexpr std::uint64_t kPendingStamp = UINT64_MAX;

/// A pool of cells. A cell is free or holds one token; a token has one owner at least. Cell
/// numbers and sequences are the caller's to check. Mutators don't allocate and don't throw.
class Cells {
public:
  /// size <= 2^31 - 1, n_seq_max >= 1. Cells [i * tile_cells, (i + 1) * tile_cells) are tile i,
  /// which means nothing here but that the cells in use in it are counted; the last one may be
  /// shorter.
  Cells(std::int64_t size, int n_seq_max, int tile_cells = 1);

  // --- questions -------------------------------------------------------------------------------

  std::int64_t size() const { return static_cast<std::int64_t>(pos_.size()); }
  int n_seq_max() const { return n_seq_max_; }
  std::int64_t num_used() const { return num_used_; }
  std::int64_t num_free() const { return size() - num_used_; }
  std::int64_t num_pending() const { return num_pending_; }
  std::int64_t num_committed() const { return num_used_ - num_pending_; }
  /// Every cell at or above this one is free.
  std::int32_t end() const { return end_; }

  int tile_cells() const { return tile_cells_; }
  std::int32_t num_tiles() const { return tile_of(size() + tile_cells_ - 1); }
  std::int32_t tile_of(std::int64_t cell) const {
    return static_cast<std::int32_t>(cell / tile_cells_);
  }
  std::int32_t first_of(std::int32_t tile) const { return tile * tile_cells_; }
  std::int32_t end_of(std::int32_t tile) const {
    return static_cast<std::int32_t>(std::min((std::int64_t{tile} + 1) * tile_cells_, size()));
  }
  std::int32_t num_used_in(std::int32_t tile) const { return used_in_[tile]; }
  std::int32_t num_free_in(std::int32_t tile) const {
    return end_of(tile) - first_of(tile) - used_in_[tile];
  }
  /// There is one.
  std::int32_t lowest_free_in(std::int32_t tile) const;

  bool in_use(std::int32_t cell) const { return pos_[cell] >= 0; }
  bool pending(std::int32_t cell) const { return stamp_[cell] == kPendingStamp; }
  bool committed(std::int32_t cell) const { return in_use(cell) && !pending(cell); }
  std::int32_t pos(std::int32_t cell) const { return pos_[cell]; }
  std::uint64_t stamp(std::int32_t cell) const { return stamp_[cell]; }
  bool owned_by(std::int32_t cell, int seq) const {
    return (owners(cell)[seq / 64] >> (seq % 64) & 1) != 0;
  }
  /// Bit s % 64 of word s / 64 is set where sequence s owns the cell.
  const std::uint64_t *owners(std::int32_t cell) const { return owners_.data() + cell * words_; }
  std::size_t words_per_cell() const { return words_; }
  /// Whether the cell has more owners than one.
  bool shared(std::int32_t cell) const;
  /// Lists the cells that seq owns with low <= position <= high, ascending, with their positions;
  /// both arrays have room for num_used(). Pending ones are left out where so asked.
  std::int64_t collect(int seq, std::int64_t low, std::int64_t high, bool with_pending,
                       std::int32_t *cells, std::int32_t *positions) const;
  /// A strict order of committed cells by age. Equal stamps are copies of one token (see seq_add);
  /// they are told apart by what they hold, and by the number of the cell only where all else is
  /// equal.
  bool older(std::int32_t a, std::int32_t b) const;
  /// Allocated for the books.
  std::size_t bytes() const;

  // --- mutators --------------------------------------------------------------------------------

  /// There is one. A mutator because it remembers how far it looked.
  std::int32_t lowest_free();
  /// Puts a token into a cell that is free; words: its owners, words_per_cell() words, not all
  /// zero.
  void put(std::int32_t cell, std::int32_t pos, std::uint64_t stamp, const std::uint64_t *words);
  /// The same with all of a cell's data as it stands in from (of the same n_seq_max).
  void put_copy(std::int32_t cell, const Cells &from, std::int32_t from_cell);
  void release(std::int32_t cell);
  void set_pos(std::int32_t cell, std::int32_t pos) { pos_[cell] = pos; }
  /// Gives a pending token its age.
  void set_stamp(std::int32_t cell, std::uint64_t stamp);
  void add_owner(std::int32_t cell, int seq);
  /// Frees the cell when the last owner goes.
  void remove_owner(std::int32_t cell, int seq);
  /// Replaces all owners; none frees the cell. words: words_per_cell() of them.
  void set_owners(std::int32_t cell, const std::uint64_t *words);
  void set_only_owner(std::int32_t cell, int seq);
  void clear();

private:
  void occupy(std::int32_t cell, std::int32_t pos, std::uint64_t stamp);

  int n_seq_max_;
  int tile_cells_;
  std::size_t words_;                 ///< 64-bit words of a cell's owner set
  std::vector<std::int32_t> pos_;     ///< -1 exactly where the cell is free
  std::vector<std::uint64_t> stamp_;  ///< of a free cell: 0
  std::vector<std::uint64_t> owners_; ///< words_ a cell; all zero exactly where the cell is free
  std::vector<std::int32_t> used_in_; ///< by tile: cells with pos_ >= 0
  std::int64_t num_used_ = 0;         ///< cells with pos_ >= 0
  std::int64_t num_pending_ = 0;      ///< cells with stamp_ == kPendingStamp
  std::int32_t first_free_ = 0;       ///< every cell below is in use
  std::int32_t end_ = 0; ///< 0, or the cell before is in use; from here on all are free
};

} // namespace mixedkv
