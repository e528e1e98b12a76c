// A cache, its twin and the model, driven by random operations.
#pragma once

#include "cache_harness.h"
#include "mixedkv/errors.h"

#include <functional>
#include <random>

namespace {

class Driver {
public:
  Driver(const CacheConfig &config, unsigned seed)
      : cache_(config), twin_(config), model_(config), random_(seed) {}

  bool run(int num_steps) {
    for (int step = 0; step < num_steps; ++step) {
      const std::int64_t choice = below(100);
      const bool ok = choice < 72 ? ubatch() : choice < 99 ? sequence_operation() : clear();
      if (!ok) {
        std::printf("  in step %d\n", step);
        return false;
      }
      REQUIRE(matches(cache_, model_));
      REQUIRE(same(look(cache_), look(twin_), false));
    }
    return true;
  }

private:
  std::int64_t below(std::int64_t n) {
    return static_cast<std::int64_t>(random_() % static_cast<std::uint64_t>(n));
  }
  std::int64_t random_seq() { return below(model_.config.n_seq_max); }

  std::vector<Token> random_tokens() {
    const CacheConfig &config = model_.config;
    const std::int64_t all = config.hot_size + config.cold_size;
    const std::int64_t kind = below(20);
    const std::int64_t n = kind < 10   ? 1 + below(3)
                           : kind < 17 ? 1 + below(config.hot_size)
                           : kind < 19 ? 1 + below(2 * config.hot_size)
                                       : 1 + below(all + all / 8);
    const int several = config.n_seq_max > 1 ? static_cast<int>(below(3)) : 0;
    std::vector<std::int64_t> next;
    for (int seq = 0; seq < config.n_seq_max; ++seq) {
      next.push_back(cache_.seq_pos_max(seq) + 1);
    }
    const Format source = below(2) == 0 ? Format::f32 : Format::f16;
    std::int64_t seq = random_seq();
    std::vector<Token> tokens;
    for (std::int64_t i = 0; i < n; ++i) {
      if (several > 0) {
        seq = random_seq();
      }
      Token t;
      t.id = next_id_++;
      t.source = source;
      t.owners = std::uint64_t{1} << seq;
      if (several == 2 && below(4) == 0) {
        t.owners |= std::uint64_t{1} << random_seq();
      }
      t.pos = next[idx(seq)]++;
      if (below(30) == 0) {
        t.pos = below(t.pos + 5); // anywhere: a second token of a position, or a gap filled
      }
      tokens.push_back(t);
    }
    if (below(10) == 0) {
      std::shuffle(tokens.begin(), tokens.end(), random_);
    }
    return tokens;
  }

  bool ubatch() {
    const CacheConfig &config = model_.config;
    const std::vector<Token> tokens = random_tokens();
    const Seen seen_before = look(cache_);
    const Model model_before = model_;
    const bool fits = model_.find_slot(tokens);
    const std::optional<Slot> slot = find_slot(cache_, tokens);
    REQUIRE(slot.has_value() == fits);
    if (!fits) {
      REQUIRE(!cache_.has_slot());
      REQUIRE(same(look(cache_), seen_before, true));
      model_ = model_before;
      return true;
    }
    const std::int64_t num_cold = std::count_if(model_.new_tokens.begin(), model_.new_tokens.end(),
                                                [](const Token &t) { return t.cold; });
    REQUIRE(slot->num_tokens == static_cast<std::int64_t>(tokens.size()));
    REQUIRE(slot->num_cold == num_cold && slot->num_hot == slot->num_tokens - num_cold);
    REQUIRE(slot->num_moved == model_.moved - model_before.moved);
    REQUIRE(cache_.has_slot() && cache_.slot_tokens() == slot->num_tokens);
    REQUIRE(cache_.size() == static_cast<std::int64_t>(model_.tokens.size()));

    const bool keep = below(4) != 0;
    if (keep) {
      REQUIRE(find_slot(twin_, tokens).has_value());
    }
    const bool any_attend = below(3) != 0;
    for (int layer = 0; layer < config.num_layers; ++layer) {
      if (!cached(config, layer) || below(12) == 0) {
        continue; // holds zeros, then
      }
      const Format type = tokens[0].source;
      if (below(6) == 0) {
        store(cache_, tokens, layer, type, 1u << 30); // something else first
      }
      store(cache_, tokens, layer, type);
      if (keep) {
        store(twin_, tokens, layer, type);
      }
      for (Token &t : model_.new_tokens) {
        t.stored |= std::uint64_t{1} << layer;
      }
      if (!any_attend) {
        continue;
      }
      std::optional<std::int64_t> window;
      if (below(2) == 0) {
        window = below(4) == 0 ? -1 : below(config.hot_size);
      }
      const Attended got = attend(cache_, tokens, layer, window);
      REQUIRE(attended_right(model_, got, layer, window.value_or(config.window_left), random_));
      if (keep) {
        const Attended of_twin = attend(twin_, tokens, layer, window);
        REQUIRE(same_bits(got.out, of_twin.out) && same_bits(got.lse, of_twin.lse));
      }
    }
    REQUIRE(matches(cache_, without_new()));
    if (!keep) {
      cache_.restore();
      model_ = model_before;
      REQUIRE(same(look(cache_), seen_before, true));
      return true;
    }
    cache_.commit();
    twin_.commit();
    model_.commit();
    REQUIRE(!cache_.has_slot() && cache_.slot_tokens() == 0);
    return true;
  }

  Model without_new() const {
    Model model = model_;
    model.new_tokens.clear();
    return model;
  }

  /// Does the same to cache and twin; CacheFull is returned as false.
  bool both(const std::function<void(MixedCache &)> &operation) {
    bool done = true;
    for (MixedCache *cache : {&cache_, &twin_}) {
      try {
        operation(*cache);
      } catch (const CacheFull &) {
        done = false;
      }
    }
    return done;
  }

  bool sequence_operation() {
    const CacheConfig &config = model_.config;
    const std::int64_t seq = random_seq();
    const std::int64_t span = std::max<std::int64_t>(cache_.seq_pos_max(seq) + 2, 2);
    const std::int64_t p0 = below(4) == 0 ? -1 : below(span);
    const std::int64_t p1 = below(3) == 0 ? -1 : below(span) + 1;
    switch (below(7)) {
    case 0:
    case 1: {
      const std::int64_t which = below(6) == 0 ? -1 : seq;
      REQUIRE(both([&](MixedCache &c) { c.seq_rm(which, p0, p1); }));
      model_.seq_rm(which, p0, p1);
      return true;
    }
    case 2: {
      const std::int64_t dst = random_seq();
      REQUIRE(both([&](MixedCache &c) { c.seq_cp(seq, dst, p0, p1); }));
      model_.seq_cp(seq, dst, p0, p1);
      return true;
    }
    case 3:
      if (below(3) == 0) {
        REQUIRE(both([&](MixedCache &c) { c.seq_keep(seq); }));
        model_.seq_keep(seq);
      }
      return true;
    case 4: {
      const std::int64_t delta = below(2 * span) - span;
      const bool fits =
          model_.shift(seq, p0, p1, [delta](std::int64_t pos) { return pos + delta; });
      REQUIRE(both([&](MixedCache &c) { c.seq_add(seq, p0, p1, delta); }) == fits);
      return true;
    }
    case 5: {
      const std::int64_t d = 1 + below(3);
      const bool fits = model_.shift(seq, p0, p1, [d](std::int64_t pos) { return pos / d; });
      REQUIRE(both([&](MixedCache &c) { c.seq_div(seq, p0, p1, d); }) == fits);
      return true;
    }
    default: {
      std::vector<std::int64_t> sources;
      for (std::int64_t i = below(config.n_seq_max + 1); i > 0; --i) {
        sources.push_back(random_seq());
      }
      if (below(3) != 0) { // all of them, in another order or some twice
        sources.resize(idx(config.n_seq_max), seq);
      }
      REQUIRE(both([&](MixedCache &c) {
        c.seq_gather(sources.data(), static_cast<std::int64_t>(sources.size()));
      }));
      model_.seq_gather(sources);
      return true;
    }
    }
  }

  bool clear() {
    // With a slot that moved tokens, for once: it goes as if it had never been.
    Model after = model_;
    const std::vector<Token> tokens = random_tokens();
    find_slot(cache_, tokens);
    cache_.clear();
    twin_.clear();
    after.tokens.clear();
    model_ = after;
    return !cache_.has_slot();
  }

  MixedCache cache_;
  MixedCache twin_; ///< lives through the same, but for what was restored
  Model model_;
  std::mt19937 random_;
  std::uint64_t next_id_ = 1;
};

void random_operations(unsigned seed) {
  struct Grid {
    std::int64_t hot, cold, group, n_pad;
    int num_steps;
  };
  const Grid grids[] = {
      {8, 32, 4, 4, 500}, {16, 64, 8, 8, 400}, {32, 128, 16, 8, 200}, {64, 256, 32, 16, 100}};
  for (const Grid &grid : grids) {
    for (const int n_seq_max : {1, 2, 4}) {
      for (const int pins : {0, 1, 2, 3}) {
        const int sink_tokens = pins % 2;
        // From one position to as many as the level leaves.
        const int most = (static_cast<int>(grid.hot * 4 / 5) - 1) / n_seq_max - sink_tokens;
        const int hot_keep = pins < 2 || most < 1 ? 0 : 1 + static_cast<int>(seed * 7 % idx(most));
        CacheConfig config = small_config(grid.hot, grid.cold, grid.group, grid.n_pad);
        config.num_layers = 1 + static_cast<int>(seed % 3);
        config.n_seq_max = n_seq_max;
        config.sink_tokens = sink_tokens;
        config.hot_keep = hot_keep;
        ++seed;
        const std::string name = std::to_string(grid.hot) + "/" + std::to_string(grid.cold) + "/" +
                                 std::to_string(grid.group) + "/" + std::to_string(grid.n_pad) +
                                 " layers=" + std::to_string(config.num_layers) +
                                 " n_seq_max=" + std::to_string(n_seq_max) +
                                 " sink_tokens=" + std::to_string(sink_tokens) +
                                 " hot_keep=" + std::to_string(hot_keep);
        testing::report("cache_random " + name, Driver(config, seed).run(grid.num_steps));
      }
    }
  }
  struct Types {
    Format hot_k, hot_v, cold_k, cold_v;
  };
  const Types all_types[] = {{Format::f32, Format::f16, Format::q4_0, Format::q4_0},
                             {Format::f16, Format::f32, Format::f16, Format::q4_0},
                             {Format::q4_0, Format::q4_0, Format::q4_0, Format::q4_0},
                             {Format::f16, Format::q4_0, Format::f32, Format::f16}};
  for (const Types &types : all_types) {
    CacheConfig config = small_config(16, 64, 8, 8);
    config.n_seq_max = 3;
    config.num_layers = 2;
    config.window_left = 9;
    config.hot_k_type = types.hot_k;
    config.hot_v_type = types.hot_v;
    config.cold_k_type = types.cold_k;
    config.cold_v_type = types.cold_v;
    testing::report(std::string("cache_random_types ") + format_name(types.hot_k) + " " +
                        format_name(types.hot_v) + " " + format_name(types.cold_k) + " " +
                        format_name(types.cold_v),
                    Driver(config, ++seed).run(300));
  }
  CacheConfig config = small_config(16, 64, 3, 4);
  config.num_layers = 3;
  config.layer_filter = {1, 0, 1};
  config.n_seq_max = 2;
  config.sink_tokens = 2;
  config.threshold = 0.33;
  testing::report("cache_random_layer_filter threshold=0.33", Driver(config, ++seed).run(300));
  config.layer_filter.clear();
  config.sink_tokens = 0;
  config.threshold = 0.05; // a level of 0: nothing stays
  testing::report("cache_random level=0", Driver(config, ++seed).run(300));
  config.threshold = 1.0;
  testing::report("cache_random threshold=1", Driver(config, ++seed).run(300));
  config.hot_keep = 6; // of all 16 cells no more than four could ever move
  testing::report("cache_random threshold=1 hot_keep=6", Driver(config, ++seed).run(300));
  config.n_seq_max = 7; // find_slot has to give up one newest token for the next
  config.hot_keep = 2;
  testing::report("cache_random threshold=1 n_seq_max=7 hot_keep=2",
                  Driver(config, ++seed).run(300));
  config.n_seq_max = 2;
  config.hot_keep = 0;
  config.quantize = false;
  config.threshold = 0.8;
  testing::report("cache_random quantize=false", Driver(config, ++seed).run(300));
  config.quantize = true;
  config.cold_size = 4; // less than a batch: full all the time
  config.group_size = 8;
  testing::report("cache_random cold=4", Driver(config, ++seed).run(300));
}

} // namespace
