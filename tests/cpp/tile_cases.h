// What tests of Q4_0 tiles share: tiles and the blocks that they hold, rows of floats between
// guards, and the sweep of shapes that every product runs over.
#pragma once

#include "formats/nibble_tile.h"
#include "formats/tile_layout.h"
#include "kernel_cases.h"
#include "rows/row_plane.h"

#include <numeric>

namespace testing {

using namespace mixedkv;

using Kind = RowPlane::Kind;
constexpr int kTokens = kTileTokens;

inline std::size_t size(int n) { return static_cast<std::size_t>(n); }

inline f16_t half_of(float x) {
  f16_t half;
  kernels_for("scalar").of(Format::f16).from_f32(&x, &half, 1);
  return half;
}

inline block_q4_0 random_block(Random &random) {
  block_q4_0 block;
  const float magnitude =
      std::ldexp(0.5f + static_cast<float>(random() % 512) / 1024.0f, between(random, -6, 2));
  block.d = half_of(random() % 2 ? -magnitude : magnitude);
  for (std::uint8_t &q : block.qs)
    q = static_cast<std::uint8_t>(random());
  return block;
}

inline std::vector<block_q4_0> random_row(Random &random, int num_blocks) {
  std::vector<block_q4_0> row(size(num_blocks));
  for (block_q4_0 &block : row)
    block = random_block(random);
  return row;
}

inline void pack(Kind kind, const block_q4_0 *blocks, int first, int count, int num_blocks,
                 unsigned char *tile, int token) {
  const TileLayout &layout = *tile_layout(Format::q4_0);
  (kind == Kind::keys ? layout.put_keys : layout.put_values)(blocks, first, count, num_blocks, tile,
                                                             token);
}

inline void unpack(Kind kind, const unsigned char *tile, int num_blocks, int token, int first,
                   int count, block_q4_0 *blocks) {
  const TileLayout &layout = *tile_layout(Format::q4_0);
  (kind == Kind::keys ? layout.get_keys : layout.get_values)(tile, num_blocks, token, first, count,
                                                             blocks);
}

/// Tiles of keys or values: dense, with gaps between them, or picked in random order from more.
struct TileSet {
  Kind kind;
  int num, dim, num_blocks;
  std::ptrdiff_t stride;
  std::vector<std::int32_t> index;
  std::unique_ptr<Input<unsigned char>> bytes;
  std::vector<block_q4_0> blocks; ///< [num][kTokens][num_blocks], in the order of the kernel

  TileSet(Random &random, Kind tile_kind, int num_tiles, int row_dim, Order order)
      : kind(tile_kind), num(num_tiles), dim(row_dim), num_blocks(row_dim / QK4_0) {
    const std::size_t num_bytes = tile_bytes(Format::q4_0, size(dim));
    stride = static_cast<std::ptrdiff_t>(num_bytes) + (order == Order::dense ? 0 : 6);
    const int stored = order == Order::indexed ? 2 * num + 1 : num;
    for (int t = 0; order == Order::indexed && t < stored; ++t)
      index.push_back(t);
    std::shuffle(index.begin(), index.end(), random);
    index.resize(order == Order::indexed ? size(num) : 0);
    // The allocation ends with the last tile's last byte; scales need the alignment of a half.
    bytes.reset(
        new Input<unsigned char>(size(static_cast<int>(stride)) * size(stored - 1) + num_bytes,
                                 2 * size(between(random, 0, 3))));
    std::memset(bytes->data(), 0xff, bytes->size()); // NaN, in all that is not one of the tiles
    blocks.resize(size(num * kTokens * num_blocks));
    for (int j = 0; j < num * kTokens; ++j)
      for (int b = 0; b < num_blocks; ++b)
        put(j, b, random_block(random));
  }
  unsigned char *tile(int t) {
    return bytes->data() + stride * (index.empty() ? t : index[size(t)]);
  }
  void put(int j, int b, const block_q4_0 &block) {
    blocks[size(j * num_blocks + b)] = block;
    pack(kind, &block, b, 1, num_blocks, tile(j / kTokens), j % kTokens);
  }
  const block_q4_0 &block(int j, int b) const { return blocks[size(j * num_blocks + b)]; }
  void set_scale(int j, int b, f16_t d) {
    block_q4_0 changed = block(j, b);
    changed.d = d;
    put(j, b, changed);
  }
  Rows rows() const { return {bytes->data(), stride, index.empty() ? nullptr : index.data()}; }
  Rows rows_from(int t) const {
    if (!index.empty())
      return {bytes->data(), stride, index.data() + t};
    return {bytes->data() + stride * t, stride, nullptr};
  }
  int num_tokens() const { return num * kTokens; }
  double value(int j, int i) const { return value_of_q4(block(j, i / QK4_0), i % QK4_0); }
};

/// num rows of n floats, ld apart, NaN between them.
struct FloatRows {
  std::size_t n, ld;
  Input<float> data;
  FloatRows(Random &random, int num, int row_length, int gap)
      : n(size(row_length)), ld(n + size(gap)),
        data(size(num - 1) * ld + n, size(between(random, 0, 3))) {
    std::fill(data.data(), data.data() + data.size(), kNan);
  }
  float *row(int r) { return data.data() + size(r) * ld; }
  const float *row(int r) const { return data.data() + size(r) * ld; }
};

/// The same for what a kernel writes.
struct OutputRows {
  std::size_t n, ld;
  Output<float> data;
  OutputRows(Random &random, int num, int row_length, int gap)
      : n(size(row_length)), ld(n + size(gap)),
        data(size(num - 1) * ld + n, size(between(random, 0, 3))) {
    std::fill(data.data(), data.data() + data.size(), 12345.0f);
  }
  float *row(int r) { return data.data() + size(r) * ld; }
  bool untouched_between() {
    for (std::size_t i = 0; i < data.size(); ++i)
      if (i % ld >= n && data[i] != 12345.0f)
        return false;
    return data.guards_intact();
  }
};

inline bool same_bits(const float *a, const float *b, std::size_t n) {
  return std::memcmp(a, b, n * sizeof(float)) == 0;
}

/// Numbers of rows, of tiles and dims: every one, and mixtures.
template <typename F> void sweep_packed(unsigned seed, F &&run) {
  Random random(seed);
  for (int dim : {32, 64, 96, 128, 256, 512})
    for (int num_rows = 1; num_rows <= 9; ++num_rows) {
      run(random, num_rows, between(random, 1, 5), dim, kOrders[between(random, 0, 2)]);
      run(random, num_rows, between(random, 1, 3), dim, kOrders[(num_rows + dim / 32) % 3]);
    }
  for (int num_tiles = 1; num_tiles <= 19; ++num_tiles)
    for (Order order : kOrders)
      run(random, between(random, 1, 9), num_tiles, 32 * between(random, 1, 3), order);
  run(random, 9, 19, 128, Order::indexed);
  run(random, 1, 19, 512, Order::dense);
  run(random, 8, 17, 512, Order::strided);
}

} // namespace testing
