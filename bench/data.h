// Memory and random contents for benchmarks.
#pragma once

#include "mixedkv/formats.h"
#include "options.h"

#include <cstddef>
#include <cstdint>
#include <memory>

namespace mixedkv::bench {

/// Zeroed memory whose every page has been touched, on large pages where the system has them and
/// the size is worth it (as the caches' tiers are).
class Memory {
public:
  explicit Memory(std::size_t bytes);
  template <typename T> T *as() const { return static_cast<T *>(data_.get()); }
  std::size_t size() const { return size_; }

private:
  struct Free {
    std::size_t alignment;
    void operator()(void *data) const;
  };
  std::size_t size_;
  std::unique_ptr<void, Free> data_;
};

/// About normal, of variance 1, the same ones for the same seed.
void fill_random(float *x, std::size_t n, std::uint64_t seed);

/// Bytes of K and V of a number of tokens.
std::size_t kv_bytes(const Shape &shape, std::int64_t tokens, Format type);

/// Random rows of n values that lie one after another.
Memory random_rows(Format type, std::int64_t num_rows, std::size_t n, std::uint64_t seed);

/// num_heads runs of num_tokens random Q4_0 rows in tiles; where the last tile of a run
/// is not full, the rest of it is zeros.
Memory random_key_tiles(int num_heads, std::int64_t num_tokens, int head_dim);
Memory random_value_tiles(int num_heads, std::int64_t num_tokens, int head_dim);
/// Tiles of such a run.
std::int64_t tiles_of(std::int64_t num_tokens);

} // namespace mixedkv::bench
