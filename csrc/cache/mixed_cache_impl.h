// The rooms of a MixedCache and what its methods have in common. Those methods stand by subject:
// a ubatch from find_slot to commit or restore in mixed_cache.cpp, operations on sequences in
// mixed_cache_sequences.cpp, what can be read of a cache in mixed_cache_reading.cpp.
#pragma once

#include "cache/books/movable.h"
#include "cache/books/pending_slot.h"
#include "cache/books/sequences.h"
#include "cache/books/slot_plan.h"
#include "cache/books/tokens.h"
#include "cache/checks.h"
#include "cache/config.h"
#include "cache/journal.h"
#include "cache/key_sources.h"
#include "cache/tier.h"
#include "cache/visibility.h"
#include "mixedkv/cache.h"
#include "rows/changed_rows.h"

#include <algorithm>
#include <stdexcept>
#include <string>
#include <utility>

namespace mixedkv {

struct Counters {
  std::int64_t tokens_seen = 0;
  std::int64_t moved = 0;
  std::int64_t events = 0;
  double move_seconds = 0.0;
};

struct MixedCache::Impl {
  Impl(const CacheConfig &c, RowTransforms row_transforms)
      : config(c), transforms(std::move(row_transforms)), level(trigger_level(c)),
        layer_numbers(cached_layers(c)), hot(hot_shape(c), c.hot_size, c.n_seq_max),
        cold(cold_shape(c), cold_cells(c), c.n_seq_max),
        journal(hot_shape(c), c.quantize ? c.hot_size : 0,
                c.quantize ? most_moves(c.hot_size, c.group_size, c.n_seq_max) : 0),
        slot(std::min<std::int64_t>(c.n_seq_max, c.hot_size), hot_shape(c).num_layers),
        visibility(c.hot_size + cold_cells(c), c.n_seq_max),
        movable(c.sink_tokens, c.quantize ? c.hot_keep : 0, c.n_seq_max,
                c.quantize ? c.hot_size : 0, std::min<std::int64_t>(c.n_seq_max, c.hot_size)),
        targets(c.quantize ? static_cast<std::size_t>(c.hot_size) : 0),
        owner_words(hot.cells.words_per_cell()) {}

  /// The number of a layer among the cached ones.
  int layer_number(int layer) const {
    if (layer < 0 || layer >= config.num_layers) {
      refuse("layer", "be from 0 to " + std::to_string(config.num_layers - 1), layer);
    }
    const int number = layer_numbers[static_cast<std::size_t>(layer)];
    check(number >= 0, "layer", "be one that the layer filter keeps", layer);
    return number;
  }

  void need_slot(const char *method) const {
    if (!slot.active) {
      throw std::invalid_argument(std::string(method) +
                                  ": no slot is pending; find_slot comes first");
    }
  }
  void need_no_slot(const char *method) const {
    if (slot.active) {
      throw std::invalid_argument(std::string(method) + ": a slot of " +
                                  std::to_string(slot.num_tokens()) +
                                  " tokens is pending; commit or restore it first");
    }
  }

  /// Refuses a layer whose rows of the pending slot are not to be had.
  void need_stored(int layer, int number, const char *stored_before) const {
    if (slot.stored[static_cast<std::size_t>(number)] == 0) {
      refuse("layer", stored_before, layer);
    }
    if (slot.num_cold() > 0 && slot.scratch_layer != number) {
      refuse("layer",
             "be the one stored last, because these " + std::to_string(slot.num_tokens()) +
                 " tokens are more than hot holds",
             layer);
    }
  }
  /// Likewise for those that look: without a slot anything goes.
  void need_exportable(int layer, int number) const {
    if (slot.active) {
      need_stored(layer, number, "be stored before its rows are exported");
    }
  }

  Tiers tiers() { return {hot, cold}; }
  KeySources sources() const {
    return {cold, hot, slot.scratch.get(), slot.cold_cells.data(),
            slot.active ? slot.num_cold() : 0};
  }

  // mixed_cache_reading.cpp: tokens.h on a sequence's id, checked
  std::vector<Token> committed(std::int64_t seq) const;
  std::vector<Token> attended(std::int64_t seq, bool in_cold) const;

  // mixed_cache.cpp
  /// How n new tokens find room. Leaves movable with the look that the plan's moves go by, and with
  /// which of the new tokens are pinned where some are bound for cold. Throws std::bad_alloc.
  SlotPlan plan_room(const std::int64_t *pos, const TokenOwners &owners, std::int64_t n);
  /// Moves the oldest tokens that may move; there are as many, and cold has room.
  void move(const MovePlan &plan, bool keep_for_restore) noexcept;
  /// Puts the slot's tokens into cells, pending.
  void occupy(const TokenOwners &owners) noexcept;
  std::int32_t take(Tier &tier, std::size_t token, const TokenOwners &owners) noexcept;
  /// What an uncommitted slot changed is gone, but for its cells.
  void drop_slot() noexcept;
  void end_slot() noexcept;

  const CacheConfig config;
  const RowTransforms transforms;
  const std::int64_t level;             ///< see trigger_level
  const std::vector<int> layer_numbers; ///< by layer; -1 where it is not cached
  Tier hot;
  Tier cold;       ///< without cells where quantize is false: nothing can ever move then
  Journal journal; ///< the moves that the pending slot made
  PendingSlot slot;
  Visibility visibility;
  Counters counters;
  Counters before;              ///< counters when the pending slot was found
  std::uint64_t next_stamp = 0; ///< above the stamp of every committed token
  Movable movable;
  std::vector<std::int32_t> targets;      ///< [hot_size], scratch of move
  std::vector<std::uint64_t> owner_words; ///< scratch of take
  ChangedRows changed_k;                  ///< of a store, where rows are transformed
  ChangedRows changed_v;
};

} // namespace mixedkv
