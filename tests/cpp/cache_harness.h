// Calls of MixedCache with tokens of the model, and comparisons of all that can be seen of a cache.
#pragma once

#include "cache_model.h"
#include "reporting.h"

#include <optional>
#include <random>

namespace {

inline CacheConfig small_config(std::int64_t hot, std::int64_t cold, std::int64_t group,
                                std::int64_t n_pad) {
  CacheConfig config;
  config.num_kv_heads = 2;
  config.head_dim = 32;
  config.head_dim_v = 64;
  config.hot_size = hot;
  config.cold_size = cold;
  config.group_size = group;
  config.n_pad = n_pad;
  return config;
}

struct Seen {
  std::vector<std::vector<std::int64_t>> positions; ///< by sequence
  std::vector<std::vector<std::uint8_t>> in_cold;
  std::vector<std::vector<float>> keys; ///< by sequence and cached layer
  std::vector<std::vector<float>> values;
  CacheStats stats;
};

inline bool cached(const CacheConfig &config, int layer) {
  return config.layer_filter.empty() || config.layer_filter[idx(layer)] != 0;
}

inline Seen look(const MixedCache &cache) {
  const CacheConfig &config = cache.config();
  Seen seen;
  for (int seq = 0; seq < config.n_seq_max; ++seq) {
    const std::size_t n = idx(cache.seq_len(seq));
    seen.positions.emplace_back(n);
    seen.in_cold.emplace_back(n);
    cache.positions(seq, seen.positions.back().data(), seen.in_cold.back().data());
    for (int layer = 0; layer < config.num_layers; ++layer) {
      if (!cached(config, layer)) {
        continue;
      }
      seen.keys.emplace_back(n * idx(config.num_kv_heads) * idx(config.head_dim));
      seen.values.emplace_back(n * idx(config.num_kv_heads) * idx(config.head_dim_v));
      cache.keys(layer, seq, seen.keys.back().data());
      cache.values(layer, seq, seen.values.back().data());
    }
  }
  seen.stats = cache.stats();
  return seen;
}

inline bool same_bits(const std::vector<float> &a, const std::vector<float> &b) {
  return a.size() == b.size() &&
         (a.empty() || std::memcmp(a.data(), b.data(), a.size() * sizeof(float)) == 0);
}

/// Bit for bit, with time spent and all allocations where `strictly` (of one and the same cache).
inline bool same(const Seen &a, const Seen &b, bool strictly) {
  REQUIRE(a.positions == b.positions && a.in_cold == b.in_cold);
  REQUIRE(a.keys.size() == b.keys.size());
  for (std::size_t i = 0; i < a.keys.size(); ++i) {
    REQUIRE(same_bits(a.keys[i], b.keys[i]));
    REQUIRE(same_bits(a.values[i], b.values[i]));
  }
  REQUIRE(a.stats.hot_tokens == b.stats.hot_tokens && a.stats.cold_tokens == b.stats.cold_tokens);
  REQUIRE(a.stats.tokens_seen == b.stats.tokens_seen && a.stats.moved == b.stats.moved);
  REQUIRE(a.stats.events == b.stats.events && a.stats.bytes_saved == b.stats.bytes_saved);
  REQUIRE(a.stats.hot_bytes == b.stats.hot_bytes && a.stats.cold_bytes == b.stats.cold_bytes);
  REQUIRE(a.stats.journal_bytes == b.stats.journal_bytes);
  REQUIRE(a.stats.scratch_bytes == b.stats.scratch_bytes);
  if (strictly) {
    REQUIRE(a.stats.move_seconds == b.stats.move_seconds);
  }
  return true;
}

inline bool matches(const MixedCache &cache, const Model &model) {
  const CacheConfig &config = model.config;
  const Seen seen = look(cache);
  REQUIRE(cache.size() == static_cast<std::int64_t>(model.tokens.size()));
  REQUIRE(seen.stats.hot_tokens == model.count(false));
  REQUIRE(seen.stats.cold_tokens == model.count(true));
  REQUIRE(seen.stats.tokens_seen == model.seen);
  REQUIRE(seen.stats.moved == model.moved);
  REQUIRE(seen.stats.events == model.events);
  std::size_t at = 0;
  for (int seq = 0; seq < config.n_seq_max; ++seq) {
    const std::vector<Token> list = model.sequence(seq);
    REQUIRE(seen.positions[idx(seq)].size() == list.size());
    for (std::size_t i = 0; i < list.size(); ++i) {
      REQUIRE(seen.positions[idx(seq)][i] == list[i].pos);
      REQUIRE((seen.in_cold[idx(seq)][i] != 0) == list[i].cold);
    }
    REQUIRE(cache.seq_pos_min(seq) == (list.empty() ? -1 : list.front().pos));
    REQUIRE(cache.seq_pos_max(seq) == (list.empty() ? -1 : list.back().pos));
    for (int layer = 0; layer < config.num_layers; ++layer) {
      if (!cached(config, layer)) {
        continue;
      }
      std::vector<float> keys;
      std::vector<float> values;
      for (int head = 0; head < config.num_kv_heads; ++head) {
        for (const Token &t : list) {
          const std::vector<float> k = model.row(t, layer, key, head);
          const std::vector<float> v = model.row(t, layer, value, head);
          keys.insert(keys.end(), k.begin(), k.end());
          values.insert(values.end(), v.begin(), v.end());
        }
      }
      REQUIRE(seen.keys[at] == keys); // equal as numbers: the sign of a zero is nobody's business
      REQUIRE(seen.values[at] == values);
      ++at;
    }
  }
  return true;
}

inline std::optional<Slot> find_slot(MixedCache &cache, const std::vector<Token> &tokens) {
  std::vector<std::int64_t> pos;
  std::vector<std::int64_t> begin{0};
  std::vector<std::int64_t> ids;
  for (const Token &t : tokens) {
    pos.push_back(t.pos);
    for (int seq = 63; seq >= 0; --seq) { // the smallest need not come first
      if (t.owned_by(seq)) {
        ids.push_back(seq);
      }
    }
    begin.push_back(static_cast<std::int64_t>(ids.size()));
  }
  return cache.find_slot(pos.data(), {begin.data(), ids.data()},
                         static_cast<std::int64_t>(tokens.size()));
}

/// Rows [head][token] with room between them, as f32 or f16.
struct RowsOf {
  RowsOf(const CacheConfig &config, const std::vector<Token> &tokens, int layer, Kind kind,
         Format type, std::uint64_t id_offset = 0) {
    const int n = kind == key ? config.head_dim : config.head_dim_v;
    const std::size_t row_stride = row_bytes(type, idx(n)) + 2 * row_bytes(type, 1);
    const std::size_t head_stride = row_stride * tokens.size() + 3 * row_bytes(type, 1);
    data.resize(head_stride * idx(config.num_kv_heads));
    for (int head = 0; head < config.num_kv_heads; ++head) {
      for (std::size_t i = 0; i < tokens.size(); ++i) {
        const std::vector<float> row = raw_row(tokens[i].id + id_offset, layer, kind, head, n);
        convert_row(Format::f32, row.data(), type,
                    data.data() + idx(head) * head_stride + i * row_stride, row.size());
      }
    }
    view = {data.data(), type, static_cast<std::ptrdiff_t>(head_stride),
            static_cast<std::ptrdiff_t>(row_stride)};
  }
  std::vector<char> data;
  RowsView view;
};

inline void store(MixedCache &cache, const std::vector<Token> &tokens, int layer,
                  Format type = Format::f32, std::uint64_t id_offset = 0) {
  const RowsOf k(cache.config(), tokens, layer, key, type, id_offset);
  const RowsOf v(cache.config(), tokens, layer, value, type, id_offset);
  cache.store(layer, k.view, v.view);
}

/// Output [head][token][head_dim_v], then lse [head][token].
struct Attended {
  std::vector<float> out;
  std::vector<float> lse;
  std::vector<float> q; ///< [head][token][head_dim]
};

constexpr int kGqaRatio = 2;
constexpr float kScale = 0.17f;

inline Attended attend(MixedCache &cache, const std::vector<Token> &tokens, int layer,
                       std::optional<std::int64_t> window = std::nullopt) {
  const CacheConfig &config = cache.config();
  const int num_qo_heads = config.num_kv_heads * kGqaRatio;
  const std::size_t n = tokens.size();
  Attended result;
  for (int head = 0; head < num_qo_heads; ++head) {
    for (const Token &t : tokens) {
      const std::vector<float> row =
          raw_row(t.id ^ 0x5555, layer, key, head + 100, config.head_dim);
      result.q.insert(result.q.end(), row.begin(), row.end());
    }
  }
  result.out.assign(n * idx(num_qo_heads) * idx(config.head_dim_v), -77.0f);
  result.lse.assign(n * idx(num_qo_heads), -77.0f);
  QueryView q;
  q.data = result.q.data();
  q.row_stride = config.head_dim * static_cast<std::ptrdiff_t>(sizeof(float));
  q.head_stride = q.row_stride * static_cast<std::ptrdiff_t>(n);
  q.len = static_cast<std::int64_t>(n);
  OutputView out;
  out.data = result.out.data();
  out.row_stride = config.head_dim_v;
  out.head_stride = out.row_stride * static_cast<std::ptrdiff_t>(n);
  out.lse = result.lse.data();
  out.lse_row_stride = 1;
  out.lse_head_stride = static_cast<std::ptrdiff_t>(n);
  AttendOptions options;
  options.sm_scale = kScale;
  options.window_left = window;
  cache.attend(layer, q, num_qo_heads, options, out);
  return result;
}

/// Against the loop in double precision, for some of the queries where they are many. A key that
/// is missed or taken twice among a few hundred moves lse by some 1e-3 and more. Q4_0 kernels round
/// the query and the weights (kernels.h), which moves both by 1e-4 of the logits' size.
inline bool attended_right(const Model &model, const Attended &got, int layer, std::int64_t window,
                           std::mt19937 &random) {
  const CacheConfig &config = model.config;
  const std::size_t n = model.new_tokens.size();
  const std::size_t dim = idx(config.head_dim);
  const std::size_t dim_v = idx(config.head_dim_v);
  for (std::size_t i = 0; i < n; ++i) {
    if (n > 6 && random() % n >= 6 && i != 0 && i + 1 != n) {
      continue;
    }
    const int head = static_cast<int>(random() % idx(config.num_kv_heads * kGqaRatio));
    const std::size_t row = idx(head) * n + i;
    const std::vector<double> expected = model.attend(
        i, layer, head / kGqaRatio, got.q.data() + row * dim, static_cast<double>(kScale), window);
    double difference = 0;
    for (std::size_t d = 0; d < dim_v; ++d) {
      difference = std::max(difference,
                            std::fabs(static_cast<double>(got.out[row * dim_v + d]) - expected[d]));
    }
    const bool rounded = config.cold_k_type == Format::q4_0 || config.cold_v_type == Format::q4_0 ||
                         config.hot_k_type == Format::q4_0 || config.hot_v_type == Format::q4_0;
    REQUIRE(difference < (rounded ? 5e-4 : 1e-5));
    // lse is of the size of the logits: judged by its own.
    REQUIRE(std::fabs(static_cast<double>(got.lse[row]) - expected[dim_v]) <
            (rounded ? 2e-4 : 2e-6) * std::max(1.0, std::fabs(expected[dim_v])));
  }
  return true;
}

} // namespace
