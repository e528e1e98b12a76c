// MixedCache: directed cases, and random operations against a brute-force model.
#include "cache/books/slot_plan.h"
#include "cache_driver.h"
#include "cache_harness.h"
#include "cache_model.h"
#include "mixedkv/cache.h"
#include "mixedkv/errors.h"
#include "reporting.h"
#include "runtime/parallel.h"

#include <cmath>
#include <cstdlib>
#include <limits>
#include <new>
#include <stdexcept>

// --- allocations of this thread: counted, and refused on request --------------------------------

namespace {
thread_local std::int64_t num_allocations = 0;
thread_local std::int64_t allocations_left = -1; ///< -1: no end

void *allocate(std::size_t size) {
  ++num_allocations;
  if (allocations_left == 0) {
    throw std::bad_alloc();
  }
  if (allocations_left > 0) {
    --allocations_left;
  }
  void *p = std::malloc(size != 0 ? size : 1);
  if (p == nullptr) {
    throw std::bad_alloc();
  }
  return p;
}
} // namespace

void *operator new(std::size_t size) { return allocate(size); }
void *operator new[](std::size_t size) { return allocate(size); }
void *operator new(std::size_t size, const std::nothrow_t &) noexcept {
  try {
    return allocate(size);
  } catch (const std::bad_alloc &) {
    return nullptr;
  }
}
void operator delete(void *p) noexcept { std::free(p); }
void operator delete[](void *p) noexcept { std::free(p); }
void operator delete(void *p, std::size_t) noexcept { std::free(p); }
void operator delete[](void *p, std::size_t) noexcept { std::free(p); }

namespace {

std::uint64_t next_token_id = 1u << 20;

std::vector<Token> make_tokens(std::int64_t pos, std::int64_t n, int seq = 0) {
  std::vector<Token> tokens;
  for (std::int64_t i = 0; i < n; ++i) {
    Token t;
    t.id = next_token_id++;
    t.pos = pos + i;
    t.owners = std::uint64_t{1} << seq;
    tokens.push_back(t);
  }
  return tokens;
}

/// find_slot, store every layer, commit; false where it does not fit.
bool append(MixedCache &cache, const std::vector<Token> &tokens) {
  if (!find_slot(cache, tokens)) {
    return false;
  }
  for (int layer = 0; layer < cache.config().num_layers; ++layer) {
    store(cache, tokens, layer);
  }
  cache.commit();
  return true;
}

std::vector<std::int64_t> positions_in(const MixedCache &cache, int seq, bool cold) {
  const Seen seen = look(cache);
  std::vector<std::int64_t> positions;
  for (std::size_t i = 0; i < seen.positions[idx(seq)].size(); ++i) {
    if ((seen.in_cold[idx(seq)][i] != 0) == cold) {
      positions.push_back(seen.positions[idx(seq)][i]);
    }
  }
  return positions;
}

std::vector<std::int64_t> from_to(std::int64_t begin, std::int64_t end) {
  std::vector<std::int64_t> list;
  for (std::int64_t i = begin; i < end; ++i) {
    list.push_back(i);
  }
  return list;
}

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

template <typename E> bool throws(const std::function<void()> &call, const char *part) {
  try {
    call();
  } catch (const E &e) {
    if (std::strstr(e.what(), part) != nullptr) {
      return true;
    }
    std::printf("  message '%s' lacks '%s'\n", e.what(), part);
    return false;
  }
  std::printf("  no exception with '%s'\n", part);
  return false;
}

bool full_changes_nothing() {
  CacheConfig config = small_config(8, 8, 4, 4);
  config.n_seq_max = 2;
  MixedCache cache(config);
  for (std::int64_t pos = 0; pos < 14; ++pos) {
    REQUIRE(append(cache, make_tokens(pos, 1)));
  }
  REQUIRE(cache.stats().cold_tokens == 8 && cache.stats().hot_tokens == 6);
  Seen before = look(cache);
  REQUIRE(!find_slot(cache, make_tokens(14, 3)).has_value());
  REQUIRE(!cache.has_slot() && same(look(cache), before, true));
  cache.seq_cp(0, 1, -1, -1);
  before = look(cache);
  REQUIRE(throws<CacheFull>([&] { cache.seq_add(1, -1, -1, 1); }, "6 cells"));
  REQUIRE(same(look(cache), before, true));
  REQUIRE(throws<CacheFull>([&] { cache.seq_add(1, 0, 3, 1); }, "cold"));
  REQUIRE(same(look(cache), before, true));
  REQUIRE(throws<CacheFull>([&] { cache.seq_div(1, -1, -1, 2); }, "hot tier has 2 free of 8"));
  REQUIRE(same(look(cache), before, true));
  cache.seq_add(1, 12, -1, 5); // two copies in hot: just enough
  REQUIRE(cache.stats().hot_tokens == 8 && cache.seq_pos_max(1) == 18);
  // Position 0 stays 0 when divided: shared it stays, too.
  cache.seq_div(1, 0, 1, 3);
  REQUIRE(cache.size() == 16);
  // commit does not fail where cold is full: hot stays above its level.
  cache.seq_rm(1, -1, -1);
  REQUIRE(append(cache, make_tokens(14, 2)));
  REQUIRE(cache.stats().hot_tokens == 8 && cache.stats().cold_tokens == 8);
  REQUIRE(!find_slot(cache, make_tokens(16, 1)).has_value());
  return true;
}

bool wrong_configs() {
  const auto refused = [](const std::function<void(CacheConfig &)> &change, const char *part) {
    CacheConfig config = small_config(16, 64, 8, 8);
    change(config);
    return throws<std::invalid_argument>([&] { MixedCache cache(config); }, part);
  };
  REQUIRE(refused([](CacheConfig &c) { c.num_layers = 0; }, "num_layers"));
  REQUIRE(refused([](CacheConfig &c) { c.num_kv_heads = -1; },
                  "num_kv_heads must be at least 1, got -1"));
  REQUIRE(refused([](CacheConfig &c) { c.head_dim = 0; }, "head_dim"));
  REQUIRE(refused([](CacheConfig &c) { c.head_dim = 33; }, "got 33"));
  REQUIRE(refused([](CacheConfig &c) { c.head_dim_v = 48; }, "head_dim_v"));
  REQUIRE(refused([](CacheConfig &c) { c.hot_size = 0; }, "hot_size"));
  REQUIRE(refused([](CacheConfig &c) { c.hot_size = 12; }, "multiple of n_pad (8)"));
  REQUIRE(refused([](CacheConfig &c) { c.cold_size = 63; }, "cold_size"));
  REQUIRE(refused([](CacheConfig &c) { c.cold_size = std::int64_t{1} << 31; }, "cold_size"));
  REQUIRE(refused([](CacheConfig &c) { c.group_size = 0; }, "group_size"));
  REQUIRE(refused([](CacheConfig &c) { c.threshold = 0.0; }, "threshold"));
  REQUIRE(refused([](CacheConfig &c) { c.threshold = 1.5; }, "got 1.5"));
  REQUIRE(refused([](CacheConfig &c) { c.threshold = std::nan(""); }, "threshold"));
  REQUIRE(refused([](CacheConfig &c) { c.n_pad = 0; }, "n_pad"));
  REQUIRE(refused([](CacheConfig &c) { c.n_seq_max = 0; }, "n_seq_max"));
  REQUIRE(refused([](CacheConfig &c) { c.sink_tokens = -1; }, "sink_tokens"));
  REQUIRE(refused([](CacheConfig &c) { c.sink_tokens = 12; }, "sink_tokens")); // the level
  REQUIRE(refused(
      [](CacheConfig &c) {
        c.sink_tokens = 4;
        c.n_seq_max = 3;
      },
      "= 12, got 4"));
  REQUIRE(refused([](CacheConfig &c) { c.window_left = -2; }, "window_left"));
  REQUIRE(refused([](CacheConfig &c) { c.layer_filter = {1, 1}; }, "layer_filter"));
  REQUIRE(refused([](CacheConfig &c) { c.layer_filter = {0}; }, "layer_filter"));
  REQUIRE(refused([](CacheConfig &c) { c.hot_k_type = static_cast<Format>(7); }, "hot_k_type"));
  REQUIRE(refused(
      [](CacheConfig &c) {
        c.num_layers = 1 << 30;
        c.num_kv_heads = 1 << 30;
        c.hot_size = 1 << 30;
      },
      "hot_size"));
  CacheConfig config = small_config(16, 64, 8, 8);
  config.sink_tokens = 11;
  MixedCache just_below(config);
  config.sink_tokens = 100;
  config.quantize = false; // pins mean nothing then, nor does the cold type
  config.head_dim = 3;
  config.cold_size = -5;
  MixedCache one_tier(config);
  REQUIRE(one_tier.stats().cold_bytes == 0 && one_tier.stats().journal_bytes == 0);
  REQUIRE(one_tier.stats().cold_size == 0);
  return true;
}

bool wrong_calls() {
  CacheConfig config = small_config(16, 64, 8, 8);
  config.num_layers = 3;
  config.layer_filter = {1, 0, 1};
  config.n_seq_max = 2;
  MixedCache cache(config);
  using Bad = std::invalid_argument;
  const std::vector<Token> two = make_tokens(0, 2);
  const RowsOf k(config, two, 0, key, Format::f32);
  const RowsOf v(config, two, 0, value, Format::f32);
  const auto find = [&](std::vector<std::int64_t> pos, std::vector<std::int64_t> begin,
                        std::vector<std::int64_t> ids, std::int64_t n) {
    cache.find_slot(pos.data(), {begin.data(), ids.data()}, n);
  };
  const Seen empty = look(cache);

  // Out of order.
  REQUIRE(throws<Bad>([&] { cache.commit(); }, "commit: no slot"));
  REQUIRE(throws<Bad>([&] { cache.restore(); }, "restore: no slot"));
  REQUIRE(throws<Bad>([&] { cache.store(0, k.view, v.view); }, "store: no slot"));
  REQUIRE(throws<Bad>([&] { attend(cache, two, 0); }, "attend: no slot"));

  // find_slot.
  REQUIRE(throws<Bad>([&] { find({0}, {0, 1}, {0}, 0); }, "pos"));
  REQUIRE(throws<Bad>([&] { find({0}, {0, 1}, {0}, -3); }, "got -3"));
  REQUIRE(throws<Bad>([&] { find({0, -1}, {0, 1, 2}, {0, 0}, 2); }, "pos[1] must be from 0"));
  REQUIRE(throws<Bad>([&] { find({std::int64_t{1} << 31}, {0, 1}, {0}, 1); }, "got 2147483648"));
  REQUIRE(throws<Bad>([&] { find({0}, {0, 1}, {2}, 1); }, "seq_id[0]"));
  REQUIRE(throws<Bad>([&] { find({0}, {0, 2}, {0, -1}, 1); }, "got -1"));
  REQUIRE(throws<Bad>([&] { find({0, 1}, {0, 1, 1}, {0, 1}, 2); }, "seq_id[1] must name one"));
  REQUIRE(throws<Bad>([&] { cache.find_slot(nullptr, {}, 1); }, "null"));
  REQUIRE(!cache.has_slot() && same(look(cache), empty, true));
  // Beyond everything: no room, whatever the number; and nothing is allocated for it.
  const std::vector<Token> many = make_tokens(0, 100);
  REQUIRE(!find_slot(cache, many).has_value());
  REQUIRE(same(look(cache), empty, true));

  REQUIRE(find_slot(cache, two).has_value());
  // With a slot pending.
  const std::int64_t sources[] = {0, 5};
  REQUIRE(throws<Bad>([&] { find_slot(cache, two); }, "find_slot: a slot of 2 tokens"));
  REQUIRE(throws<Bad>([&] { cache.seq_rm(0, -1, -1); }, "seq_rm"));
  REQUIRE(throws<Bad>([&] { cache.seq_cp(0, 1, -1, -1); }, "seq_cp"));
  REQUIRE(throws<Bad>([&] { cache.seq_keep(0); }, "seq_keep"));
  REQUIRE(throws<Bad>([&] { cache.seq_add(0, -1, -1, 1); }, "seq_add"));
  REQUIRE(throws<Bad>([&] { cache.seq_div(0, -1, -1, 2); }, "seq_div"));
  REQUIRE(throws<Bad>([&] { cache.seq_gather(sources, 1); }, "seq_gather"));
  // What is not committed is not there to look at.
  REQUIRE(cache.size() == 0 && cache.seq_len(0) == 0 && cache.seq_pos_max(0) == -1);

  // store and attend.
  RowsView bad = k.view;
  bad.data = nullptr;
  REQUIRE(throws<Bad>([&] { cache.store(0, bad, v.view); }, "k must not be null"));
  bad = v.view;
  bad.type = Format::q4_0;
  REQUIRE(
      throws<Bad>([&] { cache.store(0, k.view, bad); }, "v must be rows of f32 or f16, got q4_0"));
  REQUIRE(
      throws<Bad>([&] { cache.store(-1, k.view, v.view); }, "layer must be from 0 to 2, got -1"));
  REQUIRE(throws<Bad>([&] { cache.store(3, k.view, v.view); }, "got 3"));
  REQUIRE(throws<Bad>([&] { cache.store(1, k.view, v.view); }, "filter"));
  REQUIRE(throws<Bad>([&] { attend(cache, two, 0); }, "stored before"));
  cache.store(0, k.view, v.view);
  REQUIRE(throws<Bad>([&] { attend(cache, two, 2); }, "stored before"));
  REQUIRE(throws<Bad>([&] { attend(cache, two, 1); }, "filter"));
  REQUIRE(throws<Bad>([&] { attend(cache, make_tokens(0, 3), 0); }, "got 3"));
  REQUIRE(throws<Bad>([&] { attend(cache, two, 0, -2); }, "window_left"));
  std::vector<float> buffer(1024);
  QueryView q;
  q.data = buffer.data();
  q.len = 2;
  OutputView out;
  out.data = buffer.data();
  REQUIRE(throws<Bad>([&] { cache.attend(0, q, 3, {}, out); }, "num_qo_heads"));
  REQUIRE(throws<Bad>([&] { cache.attend(0, q, 0, {}, out); }, "got 0"));
  AttendOptions options;
  options.sm_scale = std::numeric_limits<float>::infinity();
  REQUIRE(throws<Bad>([&] { cache.attend(0, q, 2, options, out); }, "sm_scale"));
  options = {};
  options.logits_soft_cap = -1.0f;
  REQUIRE(throws<Bad>([&] { cache.attend(0, q, 2, options, out); }, "logits_soft_cap"));
  q.type = Format::q4_0;
  REQUIRE(throws<Bad>([&] { cache.attend(0, q, 2, {}, out); }, "q must be f32 or f16"));
  q.data = nullptr;
  REQUIRE(throws<Bad>([&] { cache.attend(0, q, 2, {}, out); }, "q must not be null"));
  q = {};
  q.data = buffer.data();
  q.len = 2;
  REQUIRE(throws<Bad>([&] { cache.attend(0, q, 2, {}, {}); }, "out must not be null"));
  const std::int32_t index[] = {1, 0};
  q.index = index;
  REQUIRE(throws<Bad>([&] { cache.attend(0, q, 2, {}, out); }, "indexed"));
  attend(cache, two, 0);
  cache.restore();
  REQUIRE(throws<Bad>([&] { attend(cache, two, 0); }, "attend: no slot"));
  REQUIRE(same(look(cache), empty, true));
  return true;
}

bool wrong_sequences() {
  CacheConfig config = small_config(16, 64, 8, 8);
  config.n_seq_max = 2;
  MixedCache cache(config);
  REQUIRE(append(cache, make_tokens(0, 10)));
  const Seen before = look(cache);
  using Bad = std::invalid_argument;
  const std::int64_t sources[] = {0, 2, 0};
  REQUIRE(throws<Bad>([&] { cache.seq_rm(2, -1, -1); }, "seq must be"));
  REQUIRE(throws<Bad>([&] { cache.seq_cp(-1, 0, -1, -1); }, "src"));
  REQUIRE(throws<Bad>([&] { cache.seq_cp(0, 2, -1, -1); }, "dst"));
  REQUIRE(throws<Bad>([&] { cache.seq_keep(-1); }, "got -1"));
  REQUIRE(throws<Bad>([&] { cache.seq_add(5, -1, -1, 1); }, "got 5"));
  REQUIRE(throws<Bad>([&] { cache.seq_div(5, -1, -1, 1); }, "got 5"));
  REQUIRE(throws<Bad>([&] { cache.seq_div(0, -1, -1, 0); }, "d must be at least 1"));
  REQUIRE(throws<Bad>([&] { cache.seq_gather(sources, 2); }, "sources[1]"));
  REQUIRE(throws<Bad>([&] { cache.seq_gather(sources, 3); }, "sources"));
  REQUIRE(throws<Bad>([&] { cache.seq_pos_min(2); }, "seq"));
  REQUIRE(throws<Bad>([&] { cache.seq_pos_max(-1); }, "seq"));
  REQUIRE(throws<Bad>([&] { cache.seq_len(2); }, "seq"));
  REQUIRE(throws<Bad>([&] { cache.positions(2, nullptr, nullptr); }, "seq"));
  REQUIRE(throws<Bad>([&] { cache.keys(0, 2, nullptr); }, "seq"));
  REQUIRE(throws<Bad>([&] { cache.values(1, 0, nullptr); }, "layer"));
  const std::int64_t top = std::numeric_limits<std::int32_t>::max();
  REQUIRE(throws<Bad>([&] { cache.seq_add(0, -1, -1, top - 8); }, "delta"));
  REQUIRE(throws<Bad>([&] { cache.seq_add(0, -1, -1, std::numeric_limits<std::int64_t>::max()); },
                      "delta"));
  REQUIRE(same(look(cache), before, true));
  cache.seq_add(0, -1, -1, top - 9);
  REQUIRE(cache.seq_pos_max(0) == top);
  cache.seq_add(1, -1, -1, std::numeric_limits<std::int64_t>::max()); // nothing to shift
  cache.seq_add(0, -1, -1, 9 - top);
  cache.seq_add(0, -1, -1, 0);
  cache.seq_div(0, -1, -1, 1);
  REQUIRE(same(look(cache), before, true));
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

bool failed_allocations_change_nothing() {
  CacheConfig config = small_config(16, 64, 8, 8);
  config.n_seq_max = 4;
  const std::vector<Token> old_tokens = make_tokens(0, 20);
  std::vector<std::int64_t> pos;
  std::vector<std::int64_t> begin{0};
  std::vector<std::int64_t> ids;
  for (const std::int64_t seq : {0, 1, 2, 3}) {
    for (std::int64_t i = 0; i < 8; ++i) {
      pos.push_back(20 + i);
      ids.push_back(seq);
      begin.push_back(static_cast<std::int64_t>(ids.size()));
    }
  }
  const std::int64_t sources[] = {1, 0, 0, 1};
  const std::function<void(MixedCache &)> operations[] = {
      [&](MixedCache &c) {
        c.find_slot(pos.data(), {begin.data(), ids.data()}, 3);
      },
      [&](MixedCache &c) {
        c.find_slot(pos.data(), {begin.data(), ids.data()}, 32);
      },
      [&](MixedCache &c) { c.seq_add(1, -1, -1, 3); },
      [&](MixedCache &c) { c.seq_div(1, -1, -1, 2); },
      [&](MixedCache &c) { c.seq_gather(sources, 4); },
  };
  int num_failures = 0;
  for (const std::function<void(MixedCache &)> &operation : operations) {
    MixedCache cache(config);
    REQUIRE(append(cache, old_tokens));
    cache.seq_cp(0, 1, 4, 11);
    const Seen before = look(cache);
    bool failed = true;
    for (std::int64_t left = 0; failed; ++left) {
      failed = false;
      allocations_left = left;
      try {
        operation(cache);
      } catch (const std::bad_alloc &) {
        failed = true;
      }
      allocations_left = -1;
      if (failed) {
        ++num_failures;
        REQUIRE(!cache.has_slot());
        REQUIRE(same(look(cache), before, true));
      }
    }
    if (cache.has_slot()) { // commit and restore need no memory at all
      allocations_left = 0;
      cache.restore();
      allocations_left = -1;
      REQUIRE(same(look(cache), before, true));
      operation(cache);
      allocations_left = 0;
      cache.commit();
      allocations_left = -1;
    }
  }
  REQUIRE(num_failures >= 10);
  return true;
}

bool decode_allocates_nothing() {
  CacheConfig config = small_config(64, 256, 32, 16);
  config.num_layers = 2;
  config.n_seq_max = 2;
  MixedCache cache(config);
  set_num_threads(1); // waking workers is not this test's business
  std::vector<float> k(idx(2 * 2 * config.head_dim), 0.5f);
  std::vector<float> v(idx(2 * 2 * config.head_dim_v), 0.5f);
  std::vector<float> q(idx(4 * 2 * config.head_dim), 0.5f);
  std::vector<float> o(idx(4 * 2 * config.head_dim_v));
  const RowsView k_rows{k.data(), Format::f32, 2 * 32 * 4, 32 * 4};
  const RowsView v_rows{v.data(), Format::f32, 2 * 64 * 4, 64 * 4};
  QueryView queries;
  queries.data = q.data();
  queries.head_stride = 2 * 32 * 4;
  queries.row_stride = 32 * 4;
  queries.len = 2;
  OutputView out;
  out.data = o.data();
  out.head_stride = 2 * 64;
  out.row_stride = 64;
  const std::int64_t begin[] = {0, 1, 2};
  const std::int64_t ids[] = {0, 1};
  std::int64_t after_first = 0;
  const auto books = cache.stats().books_bytes;
  for (std::int64_t step = 0; step < 150; ++step) {
    const std::int64_t pos[] = {step, step};
    if (!cache.find_slot(pos, {begin, ids}, 2)) {
      return false;
    }
    for (int layer = 0; layer < 2; ++layer) {
      cache.store(layer, k_rows, v_rows);
      cache.attend(layer, queries, 4, {}, out);
    }
    if (step % 3 == 2) {
      cache.restore();
      REQUIRE(cache.find_slot(pos, {begin, ids}, 2).has_value());
    }
    cache.commit();
    if (step == 140) { // attention's own workspace has its size by now
      after_first = num_allocations;
    }
  }
  const bool none = num_allocations == after_first;
  set_num_threads(2);
  REQUIRE(none);
  REQUIRE(cache.stats().books_bytes == books);
  return true;
}

} // namespace

/// The seed of the random operations may be given, for a longer search than fits every day.
int main(int argc, char **argv) {
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
  testing::report("cache_full_changes_nothing", full_changes_nothing());
  testing::report("cache_wrong_configs", wrong_configs());
  testing::report("cache_wrong_calls", wrong_calls());
  testing::report("cache_wrong_sequences", wrong_sequences());
  testing::report("cache_not_finite_values_move", not_finite_values_move());
  testing::report("cache_failed_allocations_change_nothing", failed_allocations_change_nothing());
  testing::report("cache_decode_allocates_nothing", decode_allocates_nothing());
  random_operations(argc > 1 ? static_cast<unsigned>(std::atoi(argv[1])) : 42u);
  return testing::summary();
}
