// Which tokens may leave hot, and which of them go first. Metadata only.
#pragma once

#include "cache/books/cells.h"
#include "mixedkv/cache.h"

#include <cstddef>
#include <cstdint>
#include <vector>

namespace mixedkv {

/// What stays: positions below sink_tokens, and, of each sequence, the tokens at the hot_keep
/// highest positions that it has in hot. A token that several sequences own stays if it does for
/// one of them.
class Movable {
public:
  /// num_cells: of hot; 0 where nothing is ever picked, and hot_keep then too. num_new: of a ubatch
  /// that look takes without allocating. Throws std::bad_alloc.
  Movable(int sink_tokens, int hot_keep, int n_seq_max, std::int64_t num_cells,
          std::int64_t num_new);

  /// Looks which committed tokens are not pinned; returns how many. One look is valid, for pick,
  /// until cells take in new tokens or the next look: moving what may move pins nothing else.
  std::int64_t look(const Cells &hot) noexcept;
  /// The same once n new tokens will be in hot beside the committed ones, so that they are the
  /// newest in place of others; and which of the new ones will be pinned. Throws std::bad_alloc.
  std::int64_t look(const Cells &hot, const std::int64_t *pos, const TokenOwners &owners,
                    std::int64_t n);
  /// [n] of the latter look: non-zero where a new token is pinned.
  const std::uint8_t *new_pinned() const { return new_pinned_.data(); }
  std::int64_t num_new_pinned() const { return num_new_pinned_; }

  /// The cells of the n oldest that may move by the last look, of which there are as many, in the
  /// order in which they take cold cells. Valid until the next call.
  const std::int32_t *pick(const Cells &hot, std::int64_t n) noexcept;

  std::size_t bytes() const;

private:
  struct Entry {
    std::int32_t pos;
    std::int32_t token; ///< a cell, or -1 - i for new token i
  };

  bool may_move(const Cells &hot, std::int32_t cell) const {
    return hot.committed(cell) && hot.pos(cell) >= sink_tokens_ &&
           (hot_keep_ == 0 || pinned_[static_cast<std::size_t>(cell)] == 0);
  }
  std::int64_t count(const Cells &hot) const noexcept;
  /// Pins the newest of all entries.
  void pin_newest(const Cells &hot, const TokenOwners *owners) noexcept;
  void add_committed(const Cells &hot) noexcept;
  /// Whether a position of a sequence is among its newest. Positions come in descending order, and
  /// a sequence is open until one of its own was not.
  bool newest_of(std::int32_t pos, int seq) noexcept;

  int sink_tokens_;
  int hot_keep_;
  std::vector<std::int32_t> picked_; ///< [num_cells], so that pick allocates nothing

  // With hot_keep alone:
  std::vector<std::uint8_t> pinned_;    ///< [num_cells], of the last look: among the newest
  std::vector<Entry> entries_;          ///< scratch: tokens by position, the highest first
  std::vector<std::uint64_t> open_;     ///< scratch: sequences with positions left to pin, bits
  std::vector<std::int32_t> last_;      ///< scratch: by sequence, its lowest position so far
  std::vector<std::int32_t> num_newer_; ///< scratch: by sequence, its positions so far

  std::vector<std::uint8_t> new_pinned_;
  std::int64_t num_new_pinned_ = 0;
};

} // namespace mixedkv
