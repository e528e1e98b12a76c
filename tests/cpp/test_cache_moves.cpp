// MixedCache: what moves from hot to cold, when and in which order, and what stays.
#include "cache/books/slot_plan.h"
#include "cache_cases.h"
#include "runtime/parallel.h"

#include <cmath>
#include <limits>
#include <stdexcept>

namespace {

bool plans() {
  // The defaults: level 819; 820 in use: a quarter is 205.
  MovePlan plan = plan_moves(820, 819, 256, 820);
  REQUIRE(plan.num_tokens == 205 && plan.num_events == 1);
  plan = plan_moves(819, 819, 256, 819);
  REQUIRE(plan.num_tokens == 0 && plan.num_events == 0);
  plan = plan_moves(1024, 819, 64, 1024);
  REQUIRE(plan.num_tokens == 256 && plan.num_events == 4);
  plan = plan_moves(3, 0, 8, 3); // a quarter of 3 is none, but one goes
  REQUIRE(plan.num_tokens == 3 && plan.num_events == 3);
  plan = plan_moves(100, 10, 32, 30); // 25, then what is left
  REQUIRE(plan.num_tokens == 30 && plan.num_events == 2);

  Room room;
  room.hot_size = 64;
  room.hot_used = 50;
  room.movable = 48;
  room.cold_free = 256;
  room.level = 51;
  room.group_size = 32;
  SlotPlan slot = plan_slot(room, 14, 0);
  REQUIRE(slot.fits && slot.moves.num_tokens == 0 && slot.num_cold == 0);
  slot = plan_slot(room, 15, 0);
  REQUIRE(slot.fits && slot.moves.num_tokens == 12 && slot.moves.num_events == 1);
  slot = plan_slot(room, 62, 0); // all that hot can hold beside its 2 pins
  REQUIRE(slot.fits && slot.moves.num_tokens == 48 && slot.num_cold == 0);
  slot = plan_slot(room, 63, 0); // long: hot ends at the level, pins included
  REQUIRE(slot.fits && slot.moves.num_tokens == 48 && slot.moves.num_events == 2);
  REQUIRE(slot.num_cold == 63 - 49);
  slot = plan_slot(room, 270, 0); // cold is full but for 208: hot takes more than its level
  REQUIRE(slot.fits && slot.num_cold == 208);
  slot = plan_slot(room, 271, 0);
  REQUIRE(!slot.fits);
  slot = plan_slot(room, 100, 60); // new pins stay, above the level too
  REQUIRE(slot.fits && slot.num_cold == 40);
  slot = plan_slot(room, 100, 63); // but hot has 62 cells for them
  REQUIRE(!slot.fits);
  return true;
}

bool trigger() {
  MixedCache cache(small_config(64, 256, 32, 16)); // level 51
  for (std::int64_t pos = 0; pos < 51; ++pos) {
    REQUIRE(append(cache, make_tokens(pos, 1)));
  }
  REQUIRE(cache.stats().moved == 0);
  REQUIRE(append(cache, make_tokens(51, 1)));
  REQUIRE(cache.stats().moved == 13 && cache.stats().events == 1);
  REQUIRE(positions_in(cache, 0, true) == from_to(0, 13));
  REQUIRE(positions_in(cache, 0, false) == from_to(13, 52));
  cache.clear();
  REQUIRE(append(cache, make_tokens(0, 64))); // 64 -> 48
  REQUIRE(cache.stats().moved == 13 + 16 && cache.stats().events == 2);
  REQUIRE(append(cache, make_tokens(64, 16))); // no move in find_slot; then 64 -> 48 again
  REQUIRE(cache.stats().moved == 45 && cache.stats().tokens_seen == 52 + 80);
  REQUIRE(cache.stats().hot_tokens == 48 && cache.stats().cold_tokens == 32);
  REQUIRE(cache.stats().move_seconds > 0.0);
  // In 2 heads, 96 values: 192 bytes as f16, 54 as Q4_0.
  REQUIRE(cache.stats().bytes_saved == 32 * 2 * (192 - 54));
  return true;
}

bool first_in_first_out() {
  CacheConfig config = small_config(16, 64, 8, 8); // level 12
  config.n_seq_max = 2;
  MixedCache cache(config);
  REQUIRE(append(cache, make_tokens(1000, 6, 0))); // old, and far on
  REQUIRE(append(cache, make_tokens(0, 6, 1)));    // young, with small positions
  REQUIRE(append(cache, make_tokens(1006, 1, 0))); // 13 > 12: 3 go
  REQUIRE(positions_in(cache, 0, true) == from_to(1000, 1003));
  REQUIRE(positions_in(cache, 1, true).empty());
  // Cells are freed and used again: their numbers must not matter.
  REQUIRE(append(cache, make_tokens(1007, 3, 0))); // 13 again
  REQUIRE(positions_in(cache, 0, true) == from_to(1000, 1006));
  REQUIRE(append(cache, make_tokens(6, 3, 1)));
  REQUIRE(positions_in(cache, 1, true) == from_to(0, 3));
  REQUIRE(positions_in(cache, 0, true) == from_to(1000, 1006));
  // Inside a ubatch it goes by position.
  cache.clear();
  std::vector<Token> backwards = make_tokens(0, 13);
  std::reverse(backwards.begin(), backwards.end());
  REQUIRE(append(cache, backwards));
  REQUIRE(positions_in(cache, 0, true) == from_to(0, 3));
  return true;
}

bool pins() {
  CacheConfig config = small_config(16, 64, 8, 8); // level 12
  config.n_seq_max = 2;
  config.sink_tokens = 2;
  MixedCache cache(config);
  REQUIRE(append(cache, make_tokens(0, 8, 0)));
  REQUIRE(append(cache, make_tokens(0, 8, 1)));
  REQUIRE(positions_in(cache, 0, true) == from_to(2, 6));
  for (std::int64_t pos = 8; pos < 30; ++pos) {
    REQUIRE(append(cache, make_tokens(pos, 1, 0)));
    REQUIRE(append(cache, make_tokens(pos, 1, 1)));
    for (const int seq : {0, 1}) {
      const std::vector<std::int64_t> hot = positions_in(cache, seq, false);
      REQUIRE(hot.size() >= 2 && hot[0] == 0 && hot[1] == 1);
    }
  }
  // A long ubatch: its own pins stay too.
  cache.seq_rm(1, -1, -1);
  REQUIRE(append(cache, make_tokens(0, 30, 1)));
  REQUIRE(cache.stats().hot_tokens == 12);
  REQUIRE((positions_in(cache, 0, false) == std::vector<std::int64_t>{0, 1}));
  REQUIRE((positions_in(cache, 1, false) ==
           std::vector<std::int64_t>{0, 1, 22, 23, 24, 25, 26, 27, 28, 29}));
  return true;
}

bool long_ubatch(int num_seqs, std::int64_t window) {
  std::mt19937 random(7);
  CacheConfig config = small_config(16, 128, 8, 8); // level 12
  config.n_seq_max = num_seqs;
  config.num_layers = 2;
  config.window_left = window;
  MixedCache cache(config);
  Model model(config);
  for (int round = 0; round < 2; ++round) {
    std::vector<Token> tokens;
    for (int seq = 0; seq < num_seqs; ++seq) {
      const std::vector<Token> part = make_tokens(round * 60 / num_seqs, 60 / num_seqs, seq);
      tokens.insert(tokens.end(), part.begin(), part.end());
    }
    REQUIRE(cache.stats().scratch_bytes == 0);
    REQUIRE(model.find_slot(tokens));
    const std::optional<Slot> slot = find_slot(cache, tokens);
    REQUIRE(slot.has_value() && slot->num_hot == 12 && slot->num_cold == 48);
    REQUIRE(slot->num_moved == (round == 0 ? 0 : 12));
    REQUIRE(cache.stats().scratch_bytes == 48 * 2 * 96 * 2);
    for (int layer = 0; layer < 2; ++layer) {
      store(cache, tokens, layer);
      for (Token &t : model.new_tokens) {
        t.stored |= std::uint64_t{1} << layer;
      }
      REQUIRE(attended_right(model, attend(cache, tokens, layer), layer, window, random));
      REQUIRE(attended_right(model, attend(cache, tokens, layer, 3), layer, 3, random));
    }
    bool refused = false;
    try {
      attend(cache, tokens, 0); // layer 1 took its place in the scratch
    } catch (const std::invalid_argument &) {
      refused = true;
    }
    REQUIRE(refused);
    cache.commit();
    model.commit();
    REQUIRE(matches(cache, model));
    REQUIRE(cache.stats().scratch_bytes == 0);
    REQUIRE(cache.stats().moved == (round == 0 ? 48 : 108));
    REQUIRE(cache.stats().events == (round == 0 ? 6 : 14));
  }
  return true;
}

bool long_ubatch_is_hot_first_then_cold() {
  // In one go or token by token, cold holds the same bits.
  MixedCache at_once(small_config(16, 64, 8, 8));
  MixedCache one_by_one(small_config(16, 64, 8, 8));
  const std::vector<Token> tokens = make_tokens(0, 60);
  REQUIRE(append(at_once, tokens));
  for (const Token &t : tokens) {
    REQUIRE(append(one_by_one, {t}));
  }
  const Seen a = look(at_once);
  const Seen b = look(one_by_one);
  const std::size_t n = 48; // in cold both ways
  for (std::size_t head = 0; head < 2; ++head) {
    REQUIRE(std::memcmp(&a.keys[0][head * 60 * 32], &b.keys[0][head * 60 * 32],
                        n * 32 * sizeof(float)) == 0);
    REQUIRE(std::memcmp(&a.values[0][head * 60 * 64], &b.values[0][head * 60 * 64],
                        n * 64 * sizeof(float)) == 0);
  }
  return true;
}

bool restore_after_moves() {
  CacheConfig config = small_config(64, 256, 32, 16);
  config.num_layers = 3;
  config.n_seq_max = 2;
  MixedCache cache(config);
  MixedCache twin(config);
  for (const std::int64_t n : {20, 30}) {
    const std::vector<Token> tokens = make_tokens(0, n, n == 20);
    REQUIRE(append(cache, tokens) && append(twin, tokens));
  }
  for (MixedCache *c : {&cache, &twin}) {
    c->seq_rm(0, 3, 9); // holes, so that the choice of free cells has something to choose
  }
  const Seen before = look(cache);
  for (const std::int64_t n : {1, 40, 64, 65, 200}) { // none, some, all moved; long; longer
    const std::vector<Token> tokens = make_tokens(100, n);
    REQUIRE(find_slot(cache, tokens).has_value());
    for (int layer = 0; layer < 3; ++layer) {
      store(cache, tokens, layer);
      attend(cache, tokens, layer);
    }
    REQUIRE(n <= 20 || cache.stats().moved > before.stats.moved);
    cache.restore();
    REQUIRE(same(look(cache), before, true));
  }
  for (std::int64_t pos = 30; pos < 130; ++pos) {
    const std::vector<Token> tokens = make_tokens(pos, 1);
    REQUIRE(find_slot(cache, tokens).has_value() && find_slot(twin, tokens).has_value());
    for (int layer = 0; layer < 3; ++layer) {
      store(cache, tokens, layer);
      store(twin, tokens, layer);
      const Attended a = attend(cache, tokens, layer);
      const Attended b = attend(twin, tokens, layer);
      REQUIRE(same_bits(a.out, b.out) && same_bits(a.lse, b.lse));
    }
    cache.commit();
    twin.commit();
    REQUIRE(same(look(cache), look(twin), false));
  }
  return true;
}

bool layers_not_stored_hold_zeros() {
  CacheConfig config = small_config(16, 64, 8, 8);
  config.num_layers = 2;
  MixedCache cache(config);
  REQUIRE(append(cache, make_tokens(0, 60)));
  cache.seq_rm(-1, -1, -1); // rows of all cells are used ones now
  Model model(config);
  model.seen = 60;
  model.moved = cache.stats().moved;
  model.events = cache.stats().events;
  model.next_stamp = 60;
  for (const std::int64_t n : {10, 40}) {
    const std::vector<Token> tokens = make_tokens(n, n);
    REQUIRE(model.find_slot(tokens) && find_slot(cache, tokens).has_value());
    store(cache, tokens, 1);
    for (Token &t : model.new_tokens) {
      t.stored = 2;
    }
    cache.commit();
    model.commit();
    REQUIRE(matches(cache, model));
  }
  REQUIRE(cache.stats().cold_tokens > 0);
  return true;
}

bool shift_copies_shared_cells() {
  CacheConfig config = small_config(16, 64, 8, 8);
  config.n_seq_max = 3;
  MixedCache cache(config);
  Model model(config);
  const auto add = [&](const std::vector<Token> &tokens) {
    if (!model.find_slot(tokens)) {
      return false;
    }
    for (Token &t : model.new_tokens) {
      t.stored = 1;
    }
    model.commit();
    return append(cache, tokens);
  };
  REQUIRE(add(make_tokens(0, 16))); // 4 go to cold
  cache.seq_rm(0, 12, -1);
  model.seq_rm(0, 12, -1);
  cache.seq_cp(0, 1, 2, 8);
  model.seq_cp(0, 1, 2, 8);
  REQUIRE(matches(cache, model));
  const Seen before = look(cache);
  cache.seq_add(1, -1, -1, 50);
  REQUIRE(model.shift(1, -1, -1, [](std::int64_t pos) { return pos + 50; }));
  REQUIRE(matches(cache, model));
  const Seen after = look(cache);
  REQUIRE(before.positions[0] == after.positions[0] && same_bits(before.keys[0], after.keys[0]));
  REQUIRE(after.positions[1] == from_to(52, 58));
  REQUIRE(same_bits(before.keys[1], after.keys[1]) && same_bits(before.values[1], after.values[1]));
  REQUIRE((after.in_cold[1] == std::vector<std::uint8_t>{1, 1, 0, 0, 0, 0}));
  REQUIRE(cache.size() == 18 && cache.stats().moved == 4);

  // Copies are as old as what they were copied from: they go before younger tokens.
  REQUIRE(add(make_tokens(58, 2, 1)));
  REQUIRE(matches(cache, model));
  // Not to be shifted twice, though the copies lie where the walk comes by again.
  cache.seq_cp(1, 2, -1, -1);
  model.seq_cp(1, 2, -1, -1);
  cache.seq_rm(0, -1, -1);
  model.seq_rm(0, -1, -1);
  cache.seq_add(2, -1, -1, 1);
  REQUIRE(model.shift(2, -1, -1, [](std::int64_t pos) { return pos + 1; }));
  REQUIRE(matches(cache, model));
  // Below zero: gone for this sequence alone.
  cache.seq_add(2, -1, -1, -56);
  REQUIRE(model.shift(2, -1, -1, [](std::int64_t pos) { return pos - 56; }));
  REQUIRE(matches(cache, model));
  REQUIRE(cache.seq_pos_min(2) >= 0 && cache.seq_pos_min(1) == 52);
  cache.seq_add(2, -1, -1, std::numeric_limits<std::int64_t>::min());
  REQUIRE(cache.seq_len(2) == 0);
  return true;
}

bool not_finite_values_move() {
  CacheConfig config = small_config(8, 32, 4, 4); // level 6
  MixedCache cache(config);
  std::vector<float> k(idx(2 * config.head_dim), 1.0f);
  std::vector<float> v(idx(2 * config.head_dim_v), 1.0f);
  k[3] = std::numeric_limits<float>::infinity();
  const RowsView k_rows{k.data(), Format::f32, 32 * 4, 32 * 4};
  const RowsView v_rows{v.data(), Format::f32, 64 * 4, 64 * 4};
  for (std::int64_t pos = 0; pos < 7; ++pos) {
    REQUIRE(find_slot(cache, make_tokens(pos, 1)).has_value());
    cache.store(0, k_rows, v_rows);
    cache.commit();
  }
  std::vector<float> keys(idx(2 * 7 * 32));
  cache.keys(0, 0, keys.data());
  REQUIRE(positions_in(cache, 0, true) == from_to(0, 1));
  REQUIRE(std::isnan(keys[0]) && std::isnan(keys[31])); // the block that lost it
  REQUIRE(std::isinf(keys[32 + 3]) && keys[32 + 4] == 1.0f);
  return true;
}

} // namespace

int main() {
  set_num_threads(2);
  testing::report("cache_plans", plans());
  testing::report("cache_trigger", trigger());
  testing::report("cache_first_in_first_out", first_in_first_out());
  testing::report("cache_pins", pins());
  for (const int num_seqs : {1, 3}) {
    for (const std::int64_t window : {-1, 7, 40}) {
      testing::report("cache_long_ubatch sequences=" + std::to_string(num_seqs) +
                          " window=" + std::to_string(window),
                      long_ubatch(num_seqs, window));
    }
  }
  testing::report("cache_long_ubatch_is_hot_first_then_cold", long_ubatch_is_hot_first_then_cold());
  testing::report("cache_restore_after_moves", restore_after_moves());
  testing::report("cache_layers_not_stored_hold_zeros", layers_not_stored_hold_zeros());
  testing::report("cache_shift_copies_shared_cells", shift_copies_shared_cells());
  testing::report("cache_not_finite_values_move", not_finite_values_move());
  return testing::summary();
}
