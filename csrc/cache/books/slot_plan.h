// How many tokens move, and where those of a ubatch go: arithmetic alone.
#pragma once

#include <cstdint>

namespace mixedkv {

struct MovePlan {
  std::int64_t num_tokens = 0;
  std::int64_t num_events = 0;
};

/// Batches of moves until at most `target` hot cells are in use, or nothing can move any more
/// (limit: the tokens that may leave hot and have room in cold). A batch is a quarter of what is
/// in use, at most group_size, at least one token; batches are whole, so the last one may go
/// below the target.
MovePlan plan_moves(std::int64_t in_use, std::int64_t target, std::int64_t group_size,
                    std::int64_t limit);

/// Most tokens that move to make room for n new ones where these fit into hot: fewer than n, and a
/// whole batch.
std::int64_t most_moves(std::int64_t hot_size, std::int64_t group_size, std::int64_t n);

/// What a ubatch finds.
struct Room {
  std::int64_t hot_size = 0;
  std::int64_t hot_used = 0;
  std::int64_t movable = 0; ///< of hot_used: not pinned
  std::int64_t cold_free = 0;
  std::int64_t level = 0; ///< most cells in use in hot that no move is due for
  std::int64_t group_size = 1;
};

struct SlotPlan {
  bool fits = false;
  MovePlan moves;            ///< of older tokens, before the new ones take their cells
  std::int64_t num_cold = 0; ///< unpinned new tokens, oldest first, that are bound for cold
};

/// n new tokens, num_pinned of which may not go to cold. Where hot can take them beside its pins,
/// older tokens move until it has room. Where it cannot, all that can move does, and of the new
/// ones hot keeps those that bring it to the level, more only where cold is too full for the rest.
SlotPlan plan_slot(const Room &room, std::int64_t n, std::int64_t num_pinned);

} // namespace mixedkv
