// MixedCache: wrong configurations and calls are refused with the argument's name and value, and
// change nothing.
#include "cache_cases.h"
#include "mixedkv/errors.h"
#include "runtime/parallel.h"

#include <cmath>
#include <limits>
#include <stdexcept>

namespace {

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
    return throws<std::invalid_argument>([&] { check_config(config); }, part) &&
           throws<std::invalid_argument>([&] { MixedCache cache(config); }, part);
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
  REQUIRE(refused([](CacheConfig &c) { c.n_seq_max = std::numeric_limits<int>::max(); },
                  "n_seq_max must be at least 1 and at most 65536, got 2147483647"));
  REQUIRE(refused([](CacheConfig &c) { c.num_layers = 1 << 17; }, "num_layers"));
  REQUIRE(refused([](CacheConfig &c) { c.sink_tokens = -1; }, "sink_tokens"));
  REQUIRE(refused([](CacheConfig &c) { c.sink_tokens = 12; }, "sink_tokens")); // the level
  REQUIRE(refused(
      [](CacheConfig &c) {
        c.sink_tokens = 4;
        c.n_seq_max = 3;
      },
      "= 12, got 4"));
  REQUIRE(refused([](CacheConfig &c) { c.hot_keep = -1; }, "hot_keep"));
  REQUIRE(refused([](CacheConfig &c) { c.hot_keep = 12; }, "hot_keep must stay, times n_seq_max"));
  REQUIRE(refused(
      [](CacheConfig &c) {
        c.sink_tokens = 2;
        c.hot_keep = 4;
        c.n_seq_max = 2;
      },
      "beside sink_tokens (2) and times n_seq_max (2), below"));
  REQUIRE(refused([](CacheConfig &c) { c.window_left = -2; }, "window_left"));
  REQUIRE(refused([](CacheConfig &c) { c.layer_filter = {1, 1}; }, "layer_filter"));
  REQUIRE(refused([](CacheConfig &c) { c.layer_filter = {0}; }, "layer_filter"));
  REQUIRE(refused([](CacheConfig &c) { c.hot_k_type = static_cast<Format>(kNumFormats); },
                  "hot_k_type"));
  REQUIRE(refused(
      [](CacheConfig &c) {
        c.num_layers = 1 << 16;
        c.num_kv_heads = 1 << 30;
        c.hot_size = 1 << 30;
      },
      "hot_size"));
  CacheConfig config = small_config(16, 64, 8, 8);
  config.sink_tokens = 11;
  MixedCache just_below(config);
  config.hot_keep = 11;
  config.sink_tokens = 0;
  MixedCache newest_just_below(config);
  config.sink_tokens = config.hot_keep = 100;
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
  bad.type = static_cast<Format>(99);
  REQUIRE(throws<Bad>([&] { cache.store(0, k.view, bad); }, "v must be rows of a format, got 99"));
  CacheConfig odd = small_config(16, 64, 8, 8);
  odd.head_dim = 3;
  odd.quantize = false;
  MixedCache narrow(odd);
  REQUIRE(find_slot(narrow, two).has_value());
  bad = k.view;
  bad.type = Format::q8_0;
  REQUIRE(throws<Bad>([&] { narrow.store(0, bad, v.view); },
                      "k must be of a format that holds rows of 3 values, got q8_0"));
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

} // namespace

int main() {
  set_num_threads(2);
  testing::report("cache_full_changes_nothing", full_changes_nothing());
  testing::report("cache_wrong_configs", wrong_configs());
  testing::report("cache_wrong_calls", wrong_calls());
  testing::report("cache_wrong_sequences", wrong_sequences());
  return testing::summary();
}
