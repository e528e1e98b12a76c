// What directed tests of MixedCache share: tokens in order, appending them, positions in a tier,
// and calls that are refused.
#pragma once

#include "cache_harness.h"

#include <functional>

namespace {

inline std::uint64_t next_token_id = 1u << 20;

inline std::vector<Token> make_tokens(std::int64_t pos, std::int64_t n, int seq = 0) {
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
inline bool append(MixedCache &cache, const std::vector<Token> &tokens) {
  if (!find_slot(cache, tokens)) {
    return false;
  }
  for (int layer = 0; layer < cache.config().num_layers; ++layer) {
    store(cache, tokens, layer);
  }
  cache.commit();
  return true;
}

inline std::vector<std::int64_t> positions_in(const MixedCache &cache, int seq, bool cold) {
  const Seen seen = look(cache);
  std::vector<std::int64_t> positions;
  for (std::size_t i = 0; i < seen.positions[idx(seq)].size(); ++i) {
    if ((seen.in_cold[idx(seq)][i] != 0) == cold) {
      positions.push_back(seen.positions[idx(seq)][i]);
    }
  }
  return positions;
}

inline std::vector<std::int64_t> from_to(std::int64_t begin, std::int64_t end) {
  std::vector<std::int64_t> list;
  for (std::int64_t i = begin; i < end; ++i) {
    list.push_back(i);
  }
  return list;
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

} // namespace
