#include "cache/books/slot_plan.h"

#include <algorithm>

namespace mixedkv {

MovePlan plan_moves(std::int64_t in_use, std::int64_t target, std::int64_t group_size,
                    std::int64_t limit) {
  MovePlan plan;
  while (in_use > target && limit > 0) {
    const std::int64_t batch =
        std::min(std::max<std::int64_t>(std::min(in_use / 4, group_size), 1), limit);
    plan.num_tokens += batch;
    ++plan.num_events;
    in_use -= batch;
    limit -= batch;
  }
  return plan;
}

std::int64_t most_moves(std::int64_t hot_size, std::int64_t group_size, std::int64_t n) {
  const std::int64_t batch = std::max<std::int64_t>(std::min(hot_size / 4, group_size), 1);
  return std::min(hot_size, n - 1 + batch);
}

SlotPlan plan_slot(const Room &room, std::int64_t n, std::int64_t num_pinned) {
  SlotPlan plan;
  const std::int64_t hot_free = room.hot_size - room.hot_used;
  const std::int64_t limit = std::min(room.movable, room.cold_free);
  if (n <= hot_free + limit) {
    plan.fits = true;
    plan.moves = plan_moves(room.hot_used, room.hot_size - n, room.group_size, limit);
    return plan;
  }
  if (n > hot_free + room.cold_free) {
    return plan;
  }
  // Cold takes more than can move (else one of the two would have held), so all that can does.
  const std::int64_t pins = room.hot_used - room.movable;
  const std::int64_t cold_free = room.cold_free - room.movable;
  const std::int64_t num_hot = std::max({room.level - pins, num_pinned, n - cold_free});
  if (num_hot > room.hot_size - pins) {
    return plan;
  }
  plan.fits = true;
  plan.moves = {room.movable, (room.movable + room.group_size - 1) / room.group_size};
  plan.num_cold = n - num_hot;
  return plan;
}

} // namespace mixedkv
