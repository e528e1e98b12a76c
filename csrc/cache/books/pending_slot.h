// The tokens of the slot between find_slot and commit or restore: what they are and where they go.
#pragma once

#include "mixedkv/cache.h"
#include "rows/row_storage.h"

#include <cstddef>
#include <cstdint>
#include <memory>
#include <vector>

namespace mixedkv {

/// Vectors are kept from slot to slot for their memory; what they hold is of the slot in work.
struct PendingSlot {
  PendingSlot(std::int64_t num_tokens_reserved, int num_layers);

  /// Takes the tokens over and plans: their order of age, and that num_cold_tokens of them, the
  /// oldest that are not pinned (pinned [n]: 0 where not; of no use where none is bound for cold),
  /// are bound for cold. Throws std::bad_alloc; there is no slot then. The tokens were checked.
  void plan(const std::int64_t *token_pos, const TokenOwners &owners, std::int64_t n,
            std::int64_t num_cold_tokens, const std::uint8_t *pinned);
  /// For the rows of what plan bound for cold. Throws std::bad_alloc.
  void allocate_scratch(const RowShape &hot);
  /// Gives back what a long ubatch needed.
  void end() noexcept;

  std::int64_t num_tokens() const { return static_cast<std::int64_t>(pos.size()); }
  std::int64_t num_cold() const { return static_cast<std::int64_t>(cold_tokens.size()); }
  std::size_t bytes() const;
  std::size_t scratch_bytes() const;

  bool active = false;
  std::vector<std::int32_t> pos;         ///< of token i
  std::vector<std::int32_t> seq;         ///< smallest owner of token i
  std::vector<std::int32_t> by_age;      ///< tokens by (position, index): the order of their stamps
  std::vector<std::uint8_t> is_cold;     ///< token i is bound for cold
  std::vector<std::int32_t> cells;       ///< of token i, in the tier that is_cold says
  std::vector<std::int32_t> hot_tokens;  ///< ascending
  std::vector<std::int32_t> hot_cells;   ///< of hot_tokens[i]
  std::vector<std::int32_t> cold_tokens; ///< by (seq, age)
  std::vector<std::int32_t> cold_cells;  ///< of cold_tokens[i]
  std::vector<std::int32_t> cold_rows;   ///< 0, 1, 2, ...: scratch row of cold_tokens[i]
  std::vector<std::uint8_t> stored;      ///< by cached layer
  /// One layer of cold-bound tokens, in the hot type; null where none is bound for cold.
  std::unique_ptr<RowStorage> scratch;
  int scratch_layer = -1; ///< the cached layer that scratch holds; -1: none yet
};

} // namespace mixedkv
