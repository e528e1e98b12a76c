// A cache of one layer with a given number of tokens in each tier.
#pragma once

#include "data.h"
#include "mixedkv/cache.h"
#include "options.h"

#include <cstdint>
#include <vector>

namespace mixedkv::bench {

struct Fill {
  std::int64_t hot = 0;  ///< committed tokens
  std::int64_t cold = 0; ///< likewise
  std::int64_t slot = 1; ///< tokens of the slot that is pending afterwards
  /// Cells of cold; 0: as many as tokens in it, and where these are none the cache has one tier.
  std::int64_t cold_size = 0;
  std::int64_t group_size = 1; ///< 1: a commit that moves leaves exactly `hot` tokens in hot
  Format hot_type = Format::f16;
  Format cold_type = Format::q4_0;
  bool fit_scales = false;
  /// Tokens belong to so many sequences, in turns; a slot of as many has one of each.
  int num_seqs = 1;
};

class FilledCache {
public:
  FilledCache(const Shape &shape, const Fill &fill);

  MixedCache &get() { return cache_; }
  CacheStats stats() const { return cache_.stats(); }
  /// A slot for the next n tokens, with random rows stored.
  void store_next(std::int64_t n);
  /// The same, committed.
  void append(std::int64_t n);

private:
  Shape shape_;
  MixedCache cache_;
  std::int64_t most_tokens_; ///< in one slot
  std::int64_t num_rows_;    ///< of k_ and v_, a head
  Memory k_;
  Memory v_;
  std::int64_t next_pos_ = 0; ///< of all sequences counted through
  std::vector<std::int64_t> pos_;
  std::vector<std::int64_t> owner_begin_;
  std::vector<std::int64_t> owners_;
  std::int64_t num_seqs_;
};

} // namespace mixedkv::bench
