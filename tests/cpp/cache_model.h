// The model that MixedCache is judged by, in plain vectors: a token is a struct, a tier is a flag,
// and what attention must give is a loop in double precision over the tokens that a query may see.
// Each token's rows follow from its id, so that a misplaced row shows.
#pragma once

#include "mixedkv/cache.h"
#include "mixedkv/convert.h"

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <set>
#include <tuple>
#include <utility>
#include <vector>

namespace {

using namespace mixedkv;

template <typename T> std::size_t idx(T i) { return static_cast<std::size_t>(i); }

enum Kind { key = 0, value = 1 };

inline std::uint64_t mix(std::uint64_t x) {
  x += 0x9e3779b97f4a7c15u;
  x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9u;
  x = (x ^ (x >> 27)) * 0x94d049bb133111ebu;
  return x ^ (x >> 31);
}

/// Values of a token's row, with more bits than f16 holds.
inline std::vector<float> raw_row(std::uint64_t id, int layer, Kind kind, int head, int n) {
  std::vector<float> row(idx(n));
  for (int i = 0; i < n; ++i) {
    const std::uint64_t h =
        mix(mix(mix(mix(mix(id) + idx(layer)) + static_cast<unsigned>(kind)) + idx(head)) + idx(i));
    row[idx(i)] = static_cast<float>(static_cast<int>(h >> 40) - (1 << 23)) / (1 << 22);
  }
  return row;
}

/// What is left of a row that was stored as the one type, then as the others.
inline std::vector<float> through(const std::vector<float> &row, const std::vector<Format> &types) {
  std::vector<char> bytes(row.size() * sizeof(float));
  std::memcpy(bytes.data(), row.data(), bytes.size());
  Format type = Format::f32;
  for (const Format next : types) {
    std::vector<char> converted(row_bytes(next, row.size()));
    convert_row(type, bytes.data(), next, converted.data(), row.size());
    bytes.swap(converted);
    type = next;
  }
  std::vector<float> result(row.size());
  convert_row(type, bytes.data(), Format::f32, result.data(), row.size());
  return result;
}

constexpr std::uint64_t kPending = UINT64_MAX;

struct Token {
  std::uint64_t id = 0; ///< its rows
  std::int64_t pos = 0;
  std::uint64_t stamp = kPending; ///< age; copies of a token share it
  std::uint64_t owners = 0;       ///< bits
  bool cold = false;
  bool may_move = false;       ///< see find_movable
  std::uint64_t stored = 0;    ///< layers, bits
  Format source = Format::f32; ///< what its rows were stored from

  bool owned_by(std::int64_t seq) const { return (owners >> seq & 1) != 0; }
  bool pending() const { return stamp == kPending; }
};

inline int smallest(std::uint64_t owners) {
  int seq = 0;
  while ((owners >> seq & 1) == 0) {
    ++seq;
  }
  return seq;
}

struct Model {
  explicit Model(const CacheConfig &c) : config(c) {}

  CacheConfig config;
  std::vector<Token> tokens;
  std::vector<Token> new_tokens; ///< of the pending ubatch, in its order
  std::int64_t seen = 0;
  std::int64_t moved = 0;
  std::int64_t events = 0;
  std::uint64_t next_stamp = 0;

  std::int64_t level() const {
    return static_cast<std::int64_t>(
        std::floor(config.threshold * static_cast<double>(config.hot_size)));
  }
  std::int64_t count(bool cold) const {
    return std::count_if(tokens.begin(), tokens.end(),
                         [&](const Token &t) { return t.cold == cold; });
  }
  std::int64_t cold_room() const { return (config.quantize ? config.cold_size : 0) - count(true); }
  std::int64_t hot_room() const { return config.hot_size - count(false); }
  /// Whether a token stays: a first position, or one that fewer than hot_keep positions of hot
  /// are newer than, for one of its owners. What hot holds: its tokens, and those of ubatch.
  bool pinned(const Token &token, const std::vector<Token> &ubatch) const {
    if (token.pos < config.sink_tokens) {
      return true;
    }
    for (int seq = 0; config.hot_keep > 0 && seq < config.n_seq_max; ++seq) {
      if (!token.owned_by(seq)) {
        continue;
      }
      std::set<std::int64_t> newer;
      for (const auto *list : {&tokens, &ubatch}) {
        for (const Token &t : *list) {
          if (!t.cold && t.owned_by(seq) && t.pos > token.pos) {
            newer.insert(t.pos);
          }
        }
      }
      if (static_cast<std::int64_t>(newer.size()) < config.hot_keep) {
        return true;
      }
    }
    return false;
  }
  /// Settles what may move, until the next call: moves change nothing of it.
  std::int64_t find_movable(const std::vector<Token> &ubatch = {}) {
    std::int64_t n = 0;
    for (Token &t : tokens) {
      t.may_move = !t.cold && !pinned(t, ubatch);
      n += t.may_move;
    }
    return n;
  }
  std::int64_t movable() const {
    return std::count_if(tokens.begin(), tokens.end(), [](const Token &t) { return t.may_move; });
  }

  void move_oldest() {
    Token *oldest = nullptr;
    for (Token &t : tokens) {
      if (!t.may_move) {
        continue;
      }
      if (oldest == nullptr || std::tie(t.stamp, t.pos, t.owners) <
                                   std::tie(oldest->stamp, oldest->pos, oldest->owners)) {
        oldest = &t;
      }
    }
    oldest->cold = true;
    oldest->may_move = false;
    ++moved;
  }
  /// One event; false where nothing can move.
  bool move_batch() {
    std::int64_t batch = std::max<std::int64_t>(1, std::min(count(false) / 4, config.group_size));
    batch = std::min({batch, movable(), cold_room()});
    if (batch == 0) {
      return false;
    }
    for (std::int64_t i = 0; i < batch; ++i) {
      move_oldest();
    }
    ++events;
    return true;
  }
  std::int64_t groups(std::int64_t n) const {
    return (n + config.group_size - 1) / config.group_size;
  }

  /// Takes the tokens in, pending; false where they don't fit.
  bool find_slot(const std::vector<Token> &ubatch) {
    // The newest tokens so far stay, or, where there is no other way, those that will be.
    find_movable();
    if (find_slot_as_it_is(ubatch)) {
      return true;
    }
    find_movable(ubatch);
    return find_slot_as_it_is(ubatch);
  }
  bool find_slot_as_it_is(std::vector<Token> ubatch) {
    const std::int64_t n = static_cast<std::int64_t>(ubatch.size());
    if (n > hot_room() + std::min(movable(), cold_room())) {
      if (n > hot_room() + cold_room()) {
        return false;
      }
      const std::int64_t pins = count(false) - movable();
      const std::int64_t cold_left = cold_room() - movable();
      std::int64_t stay = 0; // pinned ones have to
      std::vector<bool> has_to;
      for (const Token &t : ubatch) {
        has_to.push_back(pinned(t, ubatch));
        stay += has_to.back();
      }
      while (pins + stay < level() || n - stay > cold_left) {
        ++stay;
      }
      if (pins + stay > config.hot_size) {
        return false;
      }
      events += groups(movable());
      while (movable() > 0) {
        move_oldest();
      }
      std::vector<Token *> by_age;
      for (Token &t : ubatch) {
        by_age.push_back(&t);
      }
      std::stable_sort(by_age.begin(), by_age.end(),
                       [](const Token *a, const Token *b) { return a->pos < b->pos; });
      std::int64_t to_cold = n - stay;
      for (Token *t : by_age) {
        if (to_cold > 0 && !has_to[idx(t - ubatch.data())]) {
          t->cold = true;
          --to_cold;
        }
      }
    }
    while (n >
           hot_room() + static_cast<std::int64_t>(std::count_if(
                            ubatch.begin(), ubatch.end(), [](const Token &t) { return t.cold; }))) {
      move_batch();
    }
    new_tokens = std::move(ubatch);
    return true;
  }

  void commit() {
    std::vector<std::size_t> order(new_tokens.size());
    for (std::size_t i = 0; i < order.size(); ++i) {
      order[i] = i;
    }
    std::stable_sort(order.begin(), order.end(), [&](std::size_t a, std::size_t b) {
      return new_tokens[a].pos < new_tokens[b].pos;
    });
    std::int64_t to_cold = 0;
    for (const std::size_t i : order) {
      new_tokens[i].stamp = next_stamp++;
      to_cold += new_tokens[i].cold;
      tokens.push_back(new_tokens[i]);
    }
    seen += static_cast<std::int64_t>(new_tokens.size());
    moved += to_cold;
    events += groups(to_cold);
    new_tokens.clear();
    find_movable();
    while (config.quantize && count(false) > level() && move_batch()) {
    }
  }

  /// Committed tokens of seq in the order of positions().
  std::vector<Token> sequence(std::int64_t seq) const {
    std::vector<Token> list;
    for (const Token &t : tokens) {
      if (t.owned_by(seq)) {
        list.push_back(t);
      }
    }
    std::stable_sort(list.begin(), list.end(), [](const Token &a, const Token &b) {
      return std::make_tuple(a.pos, a.stamp, !a.cold) < std::make_tuple(b.pos, b.stamp, !b.cold);
    });
    return list;
  }

  std::vector<float> row(const Token &t, int layer, Kind kind, int head) const {
    const int n = kind == key ? config.head_dim : config.head_dim_v;
    const Format hot = kind == key ? config.hot_k_type : config.hot_v_type;
    const Format cold = kind == key ? config.cold_k_type : config.cold_v_type;
    if ((t.stored >> layer & 1) == 0) {
      return std::vector<float>(idx(n), 0.0f);
    }
    const std::vector<float> raw = raw_row(t.id, layer, kind, head, n);
    // While its own ubatch lasts a token is attended as hot has it, wherever it is bound for.
    return t.cold && !t.pending() ? through(raw, {t.source, hot, cold})
                                  : through(raw, {t.source, hot});
  }

  /// What query q (of head h) of new token i gets; appends lse.
  std::vector<double> attend(std::size_t i, int layer, int kv_head, const float *q, double sm_scale,
                             std::int64_t window) const {
    const std::int64_t pos = new_tokens[i].pos;
    const int seq = smallest(new_tokens[i].owners);
    std::vector<double> logits;
    std::vector<const Token *> seen_tokens;
    for (const auto *list : {&tokens, &new_tokens}) {
      for (const Token &t : *list) {
        if (!t.owned_by(seq) || t.pos > pos || (window >= 0 && t.pos < pos - window)) {
          continue;
        }
        const std::vector<float> k = row(t, layer, key, kv_head);
        double x = 0;
        for (std::size_t j = 0; j < k.size(); ++j) {
          x += static_cast<double>(q[j]) * static_cast<double>(k[j]);
        }
        logits.push_back(x * sm_scale);
        seen_tokens.push_back(&t);
      }
    }
    const double m = *std::max_element(logits.begin(), logits.end());
    double s = 0;
    std::vector<double> result(idx(config.head_dim_v) + 1, 0.0);
    for (std::size_t j = 0; j < logits.size(); ++j) {
      const double p = std::exp(logits[j] - m);
      const std::vector<float> v = row(*seen_tokens[j], layer, value, kv_head);
      s += p;
      for (std::size_t d = 0; d < v.size(); ++d) {
        result[d] += p * static_cast<double>(v[d]);
      }
    }
    for (double &r : result) {
      r /= s;
    }
    result.back() = m + std::log(s);
    return result;
  }

  bool in_range(const Token &t, std::int64_t p0, std::int64_t p1) const {
    return t.pos >= p0 && (p1 < 0 || t.pos < p1);
  }
  void drop_ownerless() {
    tokens.erase(
        std::remove_if(tokens.begin(), tokens.end(), [](const Token &t) { return t.owners == 0; }),
        tokens.end());
  }
  void seq_rm(std::int64_t seq, std::int64_t p0, std::int64_t p1) {
    for (Token &t : tokens) {
      if (in_range(t, p0, p1)) {
        t.owners &= seq < 0 ? 0 : ~(std::uint64_t{1} << seq);
      }
    }
    drop_ownerless();
  }
  void seq_cp(std::int64_t src, std::int64_t dst, std::int64_t p0, std::int64_t p1) {
    for (Token &t : tokens) {
      if (t.owned_by(src) && in_range(t, p0, p1)) {
        t.owners |= std::uint64_t{1} << dst;
      }
    }
  }
  void seq_keep(std::int64_t seq) {
    for (Token &t : tokens) {
      t.owners &= std::uint64_t{1} << seq;
    }
    drop_ownerless();
  }
  /// False, and nothing changed, where copies don't fit.
  bool shift(std::int64_t seq, std::int64_t p0, std::int64_t p1,
             const std::function<std::int64_t(std::int64_t)> &new_pos) {
    const std::uint64_t bit = std::uint64_t{1} << seq;
    Model after = *this;
    after.tokens.clear();
    for (const Token &t : tokens) {
      const std::int64_t pos = new_pos(t.pos);
      if (!t.owned_by(seq) || !in_range(t, p0, p1) || pos == t.pos) {
        after.tokens.push_back(t);
        continue;
      }
      Token others = t;
      others.owners &= ~bit;
      Token own = t;
      own.owners = bit;
      own.pos = pos;
      if (others.owners != 0) {
        after.tokens.push_back(others);
      }
      if (pos >= 0) {
        after.tokens.push_back(own);
      }
    }
    if (after.hot_room() < 0 || after.cold_room() < 0) {
      return false;
    }
    *this = after;
    return true;
  }
  void seq_gather(const std::vector<std::int64_t> &sources) {
    for (Token &t : tokens) {
      std::uint64_t owners = 0;
      for (std::size_t i = 0; i < sources.size(); ++i) {
        owners |= std::uint64_t{t.owned_by(sources[i])} << i;
      }
      t.owners = owners;
    }
    drop_ownerless();
  }
};

} // namespace
