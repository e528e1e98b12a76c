#include "data.h"

#include "formats/tile_layout.h"
#include "formats/token_tile.h"
#include "mixedkv/convert.h"

#include <cmath>
#include <cstring>
#include <new>
#include <vector>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace mixedkv::bench {
namespace {

constexpr std::size_t kLine = 64;
constexpr std::size_t kLargePage = std::size_t{2} << 20;

std::uint64_t mix(std::uint64_t x) {
  x += 0x9e3779b97f4a7c15u;
  x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9u;
  x = (x ^ (x >> 27)) * 0x94d049bb133111ebu;
  return x ^ (x >> 31);
}

Memory random_tiles(int num_heads, std::int64_t num_tokens, int head_dim, std::uint64_t seed,
                    TileLayout::Put *put) {
  const std::size_t n = static_cast<std::size_t>(head_dim);
  const std::int64_t tiles = tiles_of(num_tokens);
  const int num_blocks = head_dim / QK4_0;
  Memory memory(tile_bytes(Format::q4_0, n) * static_cast<std::size_t>(num_heads * tiles));
  for (int head = 0; head < num_heads; ++head) {
    const Memory rows = random_rows(Format::q4_0, num_tokens, n, mix(seed) + head);
    for (std::int64_t token = 0; token < num_tokens; ++token) {
      const std::int64_t tile = head * tiles + token / kTileTokens;
      put(rows.as<block_q4_0>() + token * num_blocks, 0, num_blocks, num_blocks,
          memory.as<unsigned char>() + tile_bytes(Format::q4_0, n) * static_cast<std::size_t>(tile),
          static_cast<int>(token % kTileTokens));
    }
  }
  return memory;
}

} // namespace

void Memory::Free::operator()(void *data) const {
  ::operator delete(data, std::align_val_t(alignment));
}

Memory::Memory(std::size_t bytes)
    : size_(bytes), data_(nullptr, Free{bytes >= kLargePage ? kLargePage : kLine}) {
  const std::size_t alignment = data_.get_deleter().alignment;
  data_.reset(::operator new(bytes, std::align_val_t(alignment)));
#if defined(__linux__)
  if (alignment == kLargePage) {
    madvise(data_.get(), bytes, MADV_HUGEPAGE); // a wish, no more
  }
#endif
  std::memset(data_.get(), 0, bytes);
}

void fill_random(float *x, std::size_t n, std::uint64_t seed) {
  // The sum of four uniform numbers of 16 bits.
  const float scale = std::sqrt(3.0f) / 65536.0f;
  for (std::size_t i = 0; i < n; ++i) {
    const std::uint64_t bits = mix((seed << 32) + i);
    const std::uint64_t total =
        (bits & 0xffff) + (bits >> 16 & 0xffff) + (bits >> 32 & 0xffff) + (bits >> 48);
    x[i] = (static_cast<float>(total) - 2.0f * 65535.0f) * scale;
  }
}

std::size_t kv_bytes(const Shape &shape, std::int64_t tokens, Format type) {
  return 2 * row_bytes(type, static_cast<std::size_t>(shape.head_dim)) *
         static_cast<std::size_t>(tokens * shape.num_kv_heads);
}

Memory random_rows(Format type, std::int64_t num_rows, std::size_t n, std::uint64_t seed) {
  const std::size_t stride = row_bytes(type, n);
  Memory memory(stride * static_cast<std::size_t>(num_rows));
  std::vector<float> row(n);
  for (std::int64_t i = 0; i < num_rows; ++i) {
    fill_random(row.data(), n, mix(seed) + static_cast<std::uint64_t>(i));
    convert_row(Format::f32, row.data(), type,
                memory.as<char>() + stride * static_cast<std::size_t>(i), n);
  }
  return memory;
}

std::int64_t tiles_of(std::int64_t num_tokens) {
  return (num_tokens + kTileTokens - 1) / kTileTokens;
}

Memory random_key_tiles(int num_heads, std::int64_t num_tokens, int head_dim) {
  return random_tiles(num_heads, num_tokens, head_dim, 11, tile_layout(Format::q4_0)->put_keys);
}

Memory random_value_tiles(int num_heads, std::int64_t num_tokens, int head_dim) {
  return random_tiles(num_heads, num_tokens, head_dim, 12, tile_layout(Format::q4_0)->put_values);
}

} // namespace mixedkv::bench
