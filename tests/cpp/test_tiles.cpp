// Packed Q4_0: the layout against its description, bit by bit, then the kernels that read it and
// those for keys side by side, of every instruction set that this machine can run, against float64
// on the values that the blocks stand for.
//
// Bounds follow from what the kernels round. A query row is rounded to steps of its largest
// magnitude / 16256 (qk_packed), the weights p * d of a run to steps of their largest / 32767
// (pv_packed); half a step is what each number may be off by, and f32 roundings come on top.
//
// Usage: test_packed [part of a check's name]

#include "checks.h"
#include "formats/nibble_tile.h"
#include "formats/tile_layout.h"
#include "kernels/dispatch.h"
#include "rows/row_plane.h"

#include <numeric>

using namespace mixedkv;
using namespace testing;

namespace {

using Kind = RowPlane::Kind;
constexpr int kTokens = kTileTokens;

std::size_t size(int n) { return static_cast<std::size_t>(n); }

f16_t half_of(float x) {
  f16_t half;
  kernels_for("scalar").of(Format::f16).from_f32(&x, &half, 1);
  return half;
}

// --- blocks and tiles of them ------------------------------------------------------------------

block_q4_0 random_block(Random &random) {
  block_q4_0 block;
  const float magnitude =
      std::ldexp(0.5f + static_cast<float>(random() % 512) / 1024.0f, between(random, -6, 2));
  block.d = half_of(random() % 2 ? -magnitude : magnitude);
  for (std::uint8_t &q : block.qs)
    q = static_cast<std::uint8_t>(random());
  return block;
}

std::vector<block_q4_0> random_row(Random &random, int num_blocks) {
  std::vector<block_q4_0> row(size(num_blocks));
  for (block_q4_0 &block : row)
    block = random_block(random);
  return row;
}

void pack(Kind kind, const block_q4_0 *blocks, int first, int count, int num_blocks,
          unsigned char *tile, int token) {
  const TileLayout &layout = *tile_layout(Format::q4_0);
  (kind == Kind::keys ? layout.put_keys : layout.put_values)(blocks, first, count, num_blocks, tile,
                                                             token);
}

void unpack(Kind kind, const unsigned char *tile, int num_blocks, int token, int first, int count,
            block_q4_0 *blocks) {
  const TileLayout &layout = *tile_layout(Format::q4_0);
  (kind == Kind::keys ? layout.get_keys : layout.get_values)(tile, num_blocks, token, first, count,
                                                             blocks);
}

enum class Order { dense, strided, indexed };
const Order kOrders[] = {Order::dense, Order::strided, Order::indexed};

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

bool same_bits(const float *a, const float *b, std::size_t n) {
  return std::memcmp(a, b, n * sizeof(float)) == 0;
}

// --- the layout --------------------------------------------------------------------------------

void test_layout() {
  check("a tile takes the bytes that its rows take in ggml's order", [] {
    for (std::size_t n = 32; n <= 512; n += 32)
      EXPECT(tile_bytes(Format::q4_0, n) == 16 * row_bytes(Format::q4_0, n), "%zu values", n);
  });
  for (Kind kind : {Kind::keys, Kind::values}) {
    const std::string of_kind = kind == Kind::keys ? " keys" : " values";
    check("pack and unpack" + of_kind + ", every token, in parts, the others as they were", [&] {
      Random random(41);
      for (int num_blocks = 1; num_blocks <= 16; ++num_blocks) {
        const std::size_t bytes = tile_bytes(Format::q4_0, size(num_blocks * QK4_0));
        Output<unsigned char> tile(bytes, 2 * size(num_blocks % 4));
        for (std::size_t i = 0; i < bytes; ++i)
          tile[i] = static_cast<unsigned char>(random());
        std::vector<std::vector<block_q4_0>> expected(kTokens);
        for (int token = 0; token < kTokens; ++token) { // what random bytes stand for
          expected[size(token)].resize(size(num_blocks));
          unpack(kind, tile.data(), num_blocks, token, 0, num_blocks, expected[size(token)].data());
        }
        for (int step = 0; step < 4 * kTokens; ++step) {
          const int token = step < kTokens ? step : between(random, 0, kTokens - 1);
          const int first = step < kTokens ? 0 : between(random, 0, num_blocks - 1);
          const int count = step < kTokens ? num_blocks : between(random, 1, num_blocks - first);
          const std::vector<block_q4_0> blocks = random_row(random, count);
          pack(kind, blocks.data(), first, count, num_blocks, tile.data(), token);
          std::copy(blocks.begin(), blocks.end(), expected[size(token)].begin() + first);
          for (int other = 0; other < kTokens; ++other) {
            std::vector<block_q4_0> got(size(num_blocks));
            unpack(kind, tile.data(), num_blocks, other, 0, num_blocks, got.data());
            EXPECT(std::memcmp(got.data(), expected[size(other)].data(),
                               got.size() * sizeof got[0]) == 0,
                   "%d blocks, token %d after packing %d", num_blocks, other, token);
          }
          block_q4_0 one;
          unpack(kind, tile.data(), num_blocks, token, first, 1, &one);
          EXPECT(std::memcmp(&one, blocks.data(), sizeof one) == 0, "one of %d blocks", num_blocks);
        }
        EXPECT(tile.guards_intact(), "guards, %d blocks", num_blocks);
      }
    });
    check("all bits of a tile of" + of_kind + " are those of its tokens", [&] {
      // Whatever was there before, sixteen rows make the same tile.
      Random random(42);
      for (int num_blocks : {1, 2, 3, 4, 8, 16}) {
        const std::size_t bytes = tile_bytes(Format::q4_0, size(num_blocks * QK4_0));
        std::vector<unsigned char> tiles[2] = {std::vector<unsigned char>(bytes, 0x00),
                                               std::vector<unsigned char>(bytes, 0xff)};
        for (int token = 0; token < kTokens; ++token) {
          const std::vector<block_q4_0> row = random_row(random, num_blocks);
          for (auto &tile : tiles)
            pack(kind, row.data(), 0, num_blocks, num_blocks, tile.data(), token);
        }
        EXPECT(tiles[0] == tiles[1], "%d blocks", num_blocks);
      }
    });
  }
  check("words and scales lie where packed.h says", [] {
    Random random(43);
    const int num_blocks = 3;
    TileSet keys(random, Kind::keys, 1, num_blocks * QK4_0, Order::dense);
    TileSet values(random, Kind::values, 1, num_blocks * QK4_0, Order::dense);
    for (int token = 0; token < kTokens; ++token)
      for (int b = 0; b < num_blocks; ++b) {
        const int scale = num_blocks * 256 + b * 32 + token * 2;
        EXPECT(std::memcmp(keys.tile(0) + scale, &keys.block(token, b).d, 2) == 0, "key scale");
        EXPECT(std::memcmp(values.tile(0) + scale, &values.block(token, b).d, 2) == 0,
               "value scale");
        for (int i = 0; i < 16; ++i)
          EXPECT(keys.tile(0)[b * 256 + i / 4 * 64 + token * 4 + i % 4] ==
                     keys.block(token, b).qs[i],
                 "key token %d block %d byte %d", token, b, i);
        for (int i = 0; i < QK4_0; ++i) {
          const unsigned char *word =
              values.tile(0) + (token / 8 * num_blocks * QK4_0 + b * QK4_0 + i) * 4;
          const std::uint32_t bits =
              static_cast<std::uint32_t>(word[0]) | static_cast<std::uint32_t>(word[1]) << 8 |
              static_cast<std::uint32_t>(word[2]) << 16 | static_cast<std::uint32_t>(word[3]) << 24;
          const int in_eight = token % 8;
          const int nibble = static_cast<int>(bits >> 4 * (in_eight / 2 + in_eight % 2 * 4) & 15u);
          const std::uint8_t byte = values.block(token, b).qs[i % 16];
          EXPECT((nibble < 8 ? nibble : nibble - 16) == (i < 16 ? byte & 15 : byte >> 4) - 8,
                 "value token %d dim %d", token, b * QK4_0 + i);
        }
      }
  });
}

void test_row_plane() {
  const Kernels &scalar = kernels_for("scalar");
  /// A row of a type and the values that it holds.
  struct Row {
    std::vector<char> bytes;
    std::vector<float> values;
  };
  const auto make_row = [&](Random &random, Format type, int width) {
    Row row;
    row.bytes.resize(row_bytes(type, size(width)));
    row.values.resize(size(width));
    for (float &x : row.values)
      x = normal(random);
    if (type == Format::f32) {
      std::memcpy(row.bytes.data(), row.values.data(), row.bytes.size());
    } else if (type == Format::f16) {
      f16_t *halves = reinterpret_cast<f16_t *>(row.bytes.data());
      scalar.of(Format::f16).from_f32(row.values.data(), halves, size(width));
      scalar.of(Format::f16).to_f32(halves, row.values.data(), size(width));
    } else {
      block_q4_0 *blocks = reinterpret_cast<block_q4_0 *>(row.bytes.data());
      scalar.of(Format::q4_0).from_f32(row.values.data(), blocks, size(width));
      scalar.of(Format::q4_0).to_f32(blocks, row.values.data(), size(width));
    }
    return row;
  };
  const auto quantized = [&](std::vector<float> values) {
    std::vector<block_q4_0> blocks(values.size() / QK4_0);
    scalar.of(Format::q4_0).from_f32(values.data(), blocks.data(), values.size());
    scalar.of(Format::q4_0).to_f32(blocks.data(), values.data(), values.size());
    return values;
  };
  const Format types[] = {Format::f32, Format::f16, Format::q4_0};
  for (Kind kind : {Kind::keys, Kind::values}) {
    const std::string of_kind = kind == Kind::keys ? " keys" : " values";
    check("row plane of packed" + of_kind + ": cells are written and read alone", [&] {
      Random random(44);
      for (int width : {32, 64, 96, 128, 256, 288, 512, 544}) {
        const int heads = 2, cells = 37;
        const RowPlane plane(kind, Format::q4_0, width, heads, cells);
        EXPECT(plane.bytes() >= row_bytes(Format::q4_0, size(width)) * size(heads * cells) &&
                   plane.bytes() < row_bytes(Format::q4_0, size(width)) * size(heads * 48) + 64,
               "bytes of width %d", width);
        Output<char> base(plane.bytes(), 0);
        std::vector<std::vector<float>> expected(size(heads * cells));
        for (int head = 0; head < heads; ++head)
          for (int cell = 0; cell < cells; ++cell) {
            plane.put_zeros(base.data(), head, cell, Format::f32);
            expected[size(head * cells + cell)].assign(size(width), 0.0f);
          }
        for (int step = 0; step < 60; ++step) {
          const int head = between(random, 0, heads - 1), cell = between(random, 0, cells - 1);
          const Format type = types[step % 3];
          const Row row = make_row(random, type, width);
          std::vector<float> &values = expected[size(head * cells + cell)];
          switch (step % 4) {
          case 0: { // from a plane of rows
            const RowPlane rows(kind, type, width, heads, 3);
            std::vector<char> other(rows.bytes());
            if (rows.layout() == Layout::tiles) {
              rows.put(other.data(), head, 2, Format::q4_0, row.bytes.data());
            } else {
              rows.put(other.data(), head, 2, type, row.bytes.data());
            }
            plane.copy(base.data(), head, cell, rows, other.data(), 2);
            values = quantized(row.values);
            break;
          }
          case 1: {
            const int from = between(random, 0, cells - 1);
            plane.copy(base.data(), head, cell, plane, base.data(), from);
            values = std::vector<float>(expected[size(head * cells + from)]);
            break;
          }
          default:
            plane.put(base.data(), head, cell, type, row.bytes.data());
            // Blocks stay as they are: quantising their values anew may turn a block's sign.
            values = type == Format::q4_0 ? row.values : quantized(row.values);
          }
          if (step % 4 == 0 && type == Format::q4_0)
            values = row.values;
          for (int h = 0; h < heads; ++h)
            for (int c = 0; c < cells; ++c) {
              std::vector<float> got(size(width));
              plane.get(base.data(), h, c, got.data());
              EXPECT(got == expected[size(h * cells + c)], "width %d head %d cell %d step %d",
                     width, h, c, step);
            }
        }
        EXPECT(base.guards_intact(), "guards, width %d", width);
        // Back to rows.
        for (Format type : {Format::f32, Format::f16}) {
          const RowPlane rows(kind, type, width, heads, 2);
          std::vector<char> other(rows.bytes());
          rows.copy(other.data(), 1, 1, plane, base.data(), 20);
          std::vector<float> got(size(width));
          rows.get(other.data(), 1, 1, got.data());
          for (int i = 0; i < width; ++i) {
            const float want = expected[size(cells + 20)][size(i)];
            EXPECT(std::fabs(got[size(i)] - want) <=
                       (type == Format::f32 ? 0.0f : std::fabs(want) / 2048 + 1e-7f),
                   "width %d value %d", width, i);
          }
        }
      }
    });
  }
}

// --- packed keys -------------------------------------------------------------------------------

struct Prepared {
  std::vector<float> floats;
  Prepared(const Kernels &kernels, const float *q, std::size_t ld_q, int num_rows, int dim) {
    const std::size_t n = tile_query_floats(size(dim)) * size(num_rows);
    Output<float> out(n, 1);
    kernels.tiles_of(Format::q4_0)->prepare_query(q, ld_q, num_rows, dim, out.data());
    EXPECT(out.guards_intact(), "guards of a prepared query: rows %d dim %d", num_rows, dim);
    floats.assign(out.data(), out.data() + n);
  }
};

/// Scores of a query row against tiles [first, first + count), alone.
std::vector<float> scores_alone(const Kernels &kernels, const float *q, const TileSet &keys,
                                int first, int count) {
  const Prepared prepared(kernels, q, 0, 1, keys.dim);
  std::vector<float> scores(size(count * kTokens));
  const Rows rows = keys.rows_from(first);
  kernels.tiles_of(Format::q4_0)
      ->qk(prepared.floats.data(), 1, &rows, count, keys.dim, scores.data(), 0);
  return scores;
}

void expect_scores(const float *scores, const float *q, const TileSet &keys, bool typical) {
  double largest = 0, norm_q = 0;
  for (int i = 0; i < keys.dim; ++i) {
    largest = std::max(largest, std::fabs(static_cast<double>(q[i])));
    norm_q += static_cast<double>(q[i]) * q[i];
  }
  for (int j = 0; j < keys.num_tokens(); ++j) {
    double expected = 0, magnitude = 0, sum_k = 0, norm_k = 0;
    for (int i = 0; i < keys.dim; ++i) {
      const double k = keys.value(j, i);
      expected += q[i] * k;
      magnitude += std::fabs(q[i] * k);
      sum_k += std::fabs(k);
      norm_k += k * k;
    }
    const double rounding = 0.5 / 16256 * largest * sum_k;
    // Denormal results round to steps of their own; rows below 1e-30 count as zeros.
    const double tiny = 1e-30 * sum_k + FLT_TRUE_MIN;
    const double bound = rounding + (keys.dim + 8) * kUlp * magnitude + tiny;
    const double error = std::fabs(scores[j] - expected);
    EXPECT(error <= bound, "tiles %d dim %d: key %d: %.9g, not %.9g, bound %.3g", keys.num,
           keys.dim, j, static_cast<double>(scores[j]), expected, bound);
    if (typical)
      EXPECT(error <= 1e-4 * std::sqrt(norm_q * norm_k), "tiles %d dim %d: key %d off by %.3g",
             keys.num, keys.dim, j, error);
  }
}

void check_qk_packed(const Kernels &kernels, Random &random, int num_rows, int num_tiles, int dim,
                     Order order) {
  TileSet keys(random, Kind::keys, num_tiles, dim, order);
  FloatRows q(random, num_rows, dim, between(random, 0, 5));
  for (int r = 0; r < num_rows; ++r)
    for (int i = 0; i < dim; ++i)
      q.row(r)[i] = normal(random);
  OutputRows scores(random, num_rows, keys.num_tokens(), between(random, 0, 5));
  const Prepared prepared(kernels, q.row(0), q.ld, num_rows, dim);
  const Rows rows = keys.rows();
  kernels.tiles_of(Format::q4_0)
      ->qk(prepared.floats.data(), num_rows, &rows, num_tiles, dim, scores.row(0), scores.ld);
  EXPECT(scores.untouched_between(), "guards: rows %d tiles %d dim %d", num_rows, num_tiles, dim);
  for (int r = 0; r < num_rows; ++r) {
    expect_scores(scores.row(r), q.row(r), keys, true);
    const int t = between(random, 0, num_tiles - 1);
    const std::vector<float> alone = scores_alone(kernels, q.row(r), keys, t, 1);
    EXPECT(same_bits(scores.row(r) + t * kTokens, alone.data(), alone.size()),
           "rows %d tiles %d dim %d: row %d tile %d has other bits than alone", num_rows, num_tiles,
           dim, r, t);
  }
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

void test_qk_packed(const std::string &isa, const Kernels &kernels) {
  check(isa + " qk_packed shapes", [&] {
    sweep_packed(51, [&](Random &random, int num_rows, int num_tiles, int dim, Order order) {
      check_qk_packed(kernels, random, num_rows, num_tiles, dim, order);
    });
  });
  check(isa + " qk_packed of query rows that are hard to round", [&] {
    Random random(52);
    const std::vector<void (*)(Random &, float *, int)> makers = {
        [](Random &, float *q, int n) { std::fill(q, q + n, 0.0f); },
        [](Random &, float *q, int n) { std::fill(q, q + n, -0.0f); },
        [](Random &, float *q, int n) { std::fill(q, q + n, 1.0f); },
        [](Random &, float *q, int n) { std::fill(q, q + n, -1.0f); },
        [](Random &random_, float *q, int n) { // one large, the rest at half a step: all round off
          for (int i = 0; i < n; ++i)
            q[i] = 1.001f / 32512 * static_cast<float>(2 * (random_() % 8) + 1);
          q[random_() % size(n)] = random_() % 2 ? -1.0f : 1.0f;
        },
        [](Random &random_, float *q, int n) { // the largest number, either sign
          for (int i = 0; i < n; ++i)
            q[i] = random_() % 2 ? -3.7f : 3.7f;
        },
        [](Random &random_, float *q, int n) { // many magnitudes
          for (int i = 0; i < n; ++i)
            q[i] = std::ldexp(normal(random_), between(random_, -30, 10));
        },
        [](Random &random_, float *q, int n) {
          for (int i = 0; i < n; ++i)
            q[i] = 1e30f * normal(random_);
        },
        [](Random &random_, float *q, int n) {
          for (int i = 0; i < n; ++i)
            q[i] = random_() % 2 ? -1e34f : 1e34f;
        },
        [](Random &random_, float *q, int n) {
          for (int i = 0; i < n; ++i)
            q[i] = 1e-25f * normal(random_);
        },
        [](Random &random_, float *q, int n) {
          for (int i = 0; i < n; ++i)
            q[i] = 1e-33f * normal(random_);
        },
        [](Random &random_, float *q, int n) { // denormals
          for (int i = 0; i < n; ++i)
            q[i] = float_of(static_cast<std::uint32_t>(random_() & 0x803fffff));
        },
        [](Random &random_, float *q, int n) {
          std::fill(q, q + n, 0.0f);
          q[random_() % size(n)] = FLT_TRUE_MIN;
        }};
    for (int dim : {32, 96, 512})
      for (const auto &maker : makers) {
        TileSet keys(random, Kind::keys, 2, dim, Order::dense);
        for (int b = 0; b < keys.num_blocks; ++b) { // all products of one sign, at either end
          block_q4_0 block;
          block.d = half_of(1.0f);
          std::memset(block.qs, 0x00, sizeof block.qs);
          keys.put(3, b, block);
          std::memset(block.qs, 0xff, sizeof block.qs);
          keys.put(21, b, block);
        }
        std::vector<float> q(size(dim));
        maker(random, q.data(), dim);
        const std::vector<float> scores = scores_alone(kernels, q.data(), keys, 0, 2);
        expect_scores(scores.data(), q.data(), keys, false);
      }
    { // The largest numbers that there are.
      TileSet keys(random, Kind::keys, 1, 32, Order::dense);
      for (int j = 0; j < kTokens; ++j)
        keys.set_scale(j, 0, half_of(1.0f / 512));
      std::vector<float> q(32);
      for (float &x : q)
        x = random() % 2 ? -FLT_MAX : FLT_MAX;
      expect_scores(scores_alone(kernels, q.data(), keys, 0, 1).data(), q.data(), keys, false);
    }
  });
  check(isa + " qk_packed NaN and infinity of a query row reach its scores alone", [&] {
    Random random(53);
    for (int num_rows : {1, 3, 4, 8})
      for (float bad : {kNan, -kNan, kInf, -kInf, float_of(0xff800001u)})
        for (int bad_row = 0; bad_row < num_rows; ++bad_row) {
          const int dim = 64;
          TileSet keys(random, Kind::keys, 3, dim, Order::dense);
          FloatRows q(random, num_rows, dim, 0);
          for (int r = 0; r < num_rows; ++r)
            for (int i = 0; i < dim; ++i)
              q.row(r)[i] = normal(random);
          q.row(bad_row)[between(random, 0, dim - 1)] = bad;
          OutputRows scores(random, num_rows, keys.num_tokens(), 0);
          const Prepared prepared(kernels, q.row(0), q.ld, num_rows, dim);
          const Rows rows = keys.rows();
          kernels.tiles_of(Format::q4_0)
              ->qk(prepared.floats.data(), num_rows, &rows, 3, dim, scores.row(0), scores.ld);
          for (int r = 0; r < num_rows; ++r) {
            if (r != bad_row) {
              expect_scores(scores.row(r), q.row(r), keys, true);
              continue;
            }
            for (int j = 0; j < keys.num_tokens(); ++j) {
              // Where nothing is rounded, an infinity is free to stay one.
              const bool stays = isa == "scalar" && std::isinf(bad);
              const float score = scores.row(r)[j];
              EXPECT(stays ? !std::isfinite(score) : std::isnan(score), "row %d key %d: %g", r, j,
                     static_cast<double>(score));
            }
          }
        }
  });
  check(isa + " qk_packed NaN and infinity of a key reach its own scores alone", [&] {
    Random random(54);
    for (int num_rows : {1, 2, 4, 7})
      for (f16_t bad : {0x7e00, 0xfe00, 0x7c01, 0x7c00, 0xfc00})
        for (int bad_key = 0; bad_key < 32; bad_key += 3) {
          const int dim = 96;
          TileSet keys(random, Kind::keys, 2, dim, Order::dense);
          std::vector<float> q(size(num_rows * dim));
          for (float &x : q)
            x = normal(random);
          const Prepared prepared(kernels, q.data(), size(dim), num_rows, dim);
          const Rows rows = keys.rows();
          std::vector<float> before(size(num_rows) * 32), after(before.size());
          const auto run = [&](std::vector<float> &scores) {
            kernels.tiles_of(Format::q4_0)
                ->qk(prepared.floats.data(), num_rows, &rows, 2, dim, scores.data(), 32);
          };
          run(before);
          keys.set_scale(bad_key, between(random, 0, 2), bad);
          run(after);
          for (std::size_t i = 0; i < after.size(); ++i)
            if (static_cast<int>(i % 32) == bad_key)
              EXPECT(!std::isfinite(after[i]), "key %d: %g", bad_key,
                     static_cast<double>(after[i]));
            else
              EXPECT(bits_of(after[i]) == bits_of(before[i]), "bits beside key %d", bad_key);
        }
  });
  check(isa + " qk_packed without rows or tiles touches nothing", [&] {
    const Rows none = {nullptr, 0, nullptr};
    std::vector<float> q(64, 1.0f), out(64, 5.0f), expected = out;
    const Prepared prepared(kernels, q.data(), 32, 1, 32);
    kernels.tiles_of(Format::q4_0)->qk(prepared.floats.data(), 1, &none, 0, 32, out.data(), 16);
    kernels.tiles_of(Format::q4_0)->qk(prepared.floats.data(), 0, &none, 0, 32, out.data(), 16);
    kernels.tiles_of(Format::q4_0)->prepare_query(q.data(), 32, 0, 32, out.data());
    EXPECT(out == expected, "wrote");
  });
}

// --- packed values -----------------------------------------------------------------------------

/// acc after pv_packed of row r of p alone, from `before`.
std::vector<float> acc_alone(const Kernels &kernels, const float *p, const TileSet &values,
                             const float *before) {
  std::vector<float> acc(before, before + values.dim);
  const Rows rows = values.rows();
  kernels.tiles_of(Format::q4_0)->pv(p, 0, 1, &rows, values.num, values.dim, acc.data(), 0);
  return acc;
}

void expect_acc(const float *acc, const float *before, const float *p, const TileSet &values) {
  constexpr int kRunTokens = 16 * kTokens; // whose weights are rounded together
  for (int b = 0; b < values.num_blocks; ++b) {
    double rounding = 0;
    for (int begin = 0; begin < values.num_tokens(); begin += kRunTokens) {
      double largest = 0;
      int num_seen = 0;
      const int end = std::min(values.num_tokens(), begin + kRunTokens);
      for (int j = begin; j < end; ++j) {
        largest = std::max(largest, std::fabs(p[j] * value_of_half(values.block(j, b).d)));
        num_seen += p[j] != 0.0f;
      }
      // Half a step for each weight, and the three f32 roundings on its way.
      rounding += 8.0 * num_seen * largest * (0.5 / 32767 + 3 * kUlp);
      // What is smaller than that may count as nothing.
      rounding += 8.0 * num_seen * std::min(largest, 1e-30);
    }
    for (int i = b * QK4_0; i < (b + 1) * QK4_0; ++i) {
      double expected = before[i], magnitude = std::fabs(expected);
      for (int j = 0; j < values.num_tokens(); ++j)
        if (p[j] != 0.0f) {
          expected += p[j] * values.value(j, i);
          magnitude += std::fabs(p[j] * values.value(j, i));
        }
      const double bound =
          rounding + (values.num_tokens() + 4) * kUlp * magnitude + 300 * FLT_TRUE_MIN;
      EXPECT(std::fabs(acc[i] - expected) <= bound,
             "tiles %d dim %d: %d: %.9g, not %.9g, bound %.3g", values.num, values.dim, i,
             static_cast<double>(acc[i]), expected, bound);
    }
  }
}

/// Rows of p with zeros among them, as kernels see them, and acc of rows before and after.
struct PvCase {
  TileSet values;
  int num_rows;
  FloatRows p;
  std::vector<float> before; ///< [num_rows, dim]
  PvCase(Random &random, int rows, int num_tiles, int dim, Order order)
      : values(random, Kind::values, num_tiles, dim, order), num_rows(rows),
        p(random, rows, num_tiles * kTokens, between(random, 0, 5)), before(size(rows * dim)) {
    for (int r = 0; r < rows; ++r) {
      const int one_in = between(random, 1, 4);
      for (int j = 0; j < values.num_tokens(); ++j)
        p.row(r)[j] =
            between(random, 1, one_in) > 1 ? 0.0f : std::exp(-2.0f * std::fabs(normal(random)));
    }
    for (float &x : before)
      x = normal(random);
  }
  const float *before_row(int r) const { return before.data() + r * values.dim; }
  std::vector<float> run(const Kernels &kernels) const {
    std::vector<float> acc = before;
    const Rows rows = values.rows();
    kernels.tiles_of(Format::q4_0)
        ->pv(p.row(0), p.ld, num_rows, &rows, values.num, values.dim, acc.data(), size(values.dim));
    return acc;
  }
  void expect(const std::vector<float> &acc) const {
    for (int r = 0; r < num_rows; ++r)
      expect_acc(acc.data() + r * values.dim, before_row(r), p.row(r), values);
  }
  bool seen(int j) const {
    for (int r = 0; r < num_rows; ++r)
      if (p.row(r)[j] != 0.0f)
        return true;
    return false;
  }
};

void check_pv_packed(const Kernels &kernels, Random &random, int num_rows, int num_tiles, int dim,
                     Order order) {
  const PvCase pv(random, num_rows, num_tiles, dim, order);
  OutputRows acc(random, num_rows, dim, between(random, 0, 5));
  for (int r = 0; r < num_rows; ++r)
    std::copy(pv.before_row(r), pv.before_row(r) + dim, acc.row(r));
  const Rows rows = pv.values.rows();
  kernels.tiles_of(Format::q4_0)
      ->pv(pv.p.row(0), pv.p.ld, num_rows, &rows, num_tiles, dim, acc.row(0), acc.ld);
  EXPECT(acc.untouched_between(), "guards: rows %d tiles %d dim %d", num_rows, num_tiles, dim);
  for (int r = 0; r < num_rows; ++r) {
    expect_acc(acc.row(r), pv.before_row(r), pv.p.row(r), pv.values);
    const std::vector<float> alone = acc_alone(kernels, pv.p.row(r), pv.values, pv.before_row(r));
    EXPECT(same_bits(alone.data(), acc.row(r), size(dim)),
           "rows %d tiles %d dim %d: row %d has other bits than alone", num_rows, num_tiles, dim,
           r);
  }
}

void test_pv_packed(const std::string &isa, const Kernels &kernels) {
  check(isa + " pv_packed shapes", [&] {
    sweep_packed(61, [&](Random &random, int num_rows, int num_tiles, int dim, Order order) {
      check_pv_packed(kernels, random, num_rows, num_tiles, dim, order);
    });
  });
  check(isa + " pv_packed of weights and scales of many magnitudes", [&] {
    Random random(62);
    for (int num_rows : {1, 2, 3, 4, 7})
      for (int dim : {32, 96, 128})
        for (int step = 0; step < 12; ++step) {
          PvCase pv(random, num_rows, 1 + step % 3 * 9, dim, kOrders[step % 3]);
          for (int j = 0; j < pv.values.num_tokens(); ++j) {
            for (int b = 0; b < pv.values.num_blocks; ++b)
              if (step % 2)
                pv.values.set_scale(j, b, static_cast<f16_t>(random() & 0xbbff)); // any finite
            for (int r = 0; r < num_rows; ++r)
              pv.p.row(r)[j] *= std::ldexp(1.0f, step < 6    ? between(random, -20, 0)
                                                 : step == 6 ? -60
                                                 : step == 7 ? -88
                                                 : step == 8 ? -110
                                                 : step == 9 ? -130 // denormal
                                                             : between(random, -140, 0));
          }
          pv.expect(pv.run(kernels));
          std::fill(pv.before.begin(), pv.before.end(), 0.0f);
          pv.expect(pv.run(kernels));
        }
  });
  check(isa + " pv_packed rows are as accurate as alone whatever the others see", [&] {
    // Row 0 gives its weight to a token with large values, the others to tokens with small ones.
    Random random(63);
    for (int num_rows : {1, 2, 4, 6}) {
      PvCase pv(random, num_rows, 4, 64, Order::dense);
      std::fill(pv.before.begin(), pv.before.end(), 0.0f);
      for (int b = 0; b < 2; ++b)
        for (int j = 0; j < pv.values.num_tokens(); ++j)
          pv.values.set_scale(j, b, half_of(j == 5 ? 1000.0f : 1e-3f));
      for (int r = 0; r < num_rows; ++r)
        pv.p.row(r)[5] = r == 0 ? 1.0f : r == 1 ? 0.0f : 1e-9f;
      pv.expect(pv.run(kernels));
    }
  });
  check(isa + " pv_packed of zeros adds nothing", [&] {
    Random random(64);
    for (int num_rows : {1, 3, 4, 9}) {
      PvCase pv(random, num_rows, 17, 96, Order::indexed);
      for (int j = 0; j < pv.values.num_tokens(); ++j)
        for (int b = 0; b < 3; ++b)
          pv.values.set_scale(j, b, static_cast<f16_t>(random() % 2 ? 0x8000 : 0));
      EXPECT(pv.run(kernels) == pv.before, "d = 0, %d rows", num_rows);
      PvCase unseen(random, num_rows, 17, 96, Order::dense);
      for (int r = 0; r < num_rows; ++r)
        std::fill(unseen.p.row(r), unseen.p.row(r) + unseen.values.num_tokens(), 0.0f);
      EXPECT(unseen.run(kernels) == unseen.before, "p = 0, %d rows", num_rows);
      for (int j = 0; j < unseen.values.num_tokens(); ++j)
        unseen.values.set_scale(j, j % 3, static_cast<f16_t>(j % 2 ? 0x7e00 : 0xfc00));
      EXPECT(unseen.run(kernels) == unseen.before, "p = 0 and NaN, %d rows", num_rows);
    }
  });
  check(isa + " pv_packed what a row does not see has no say in a bit of its result", [&] {
    Random random(65);
    for (int num_rows : {1, 2, 3, 4, 5, 8})
      for (int num_tiles : {1, 3, 17})
        for (int step = 0; step < 6; ++step) {
          PvCase pv(random, num_rows, num_tiles, 64, kOrders[step % 3]);
          // A token of another row's alone, too.
          const int watched = between(random, 0, num_rows - 1);
          const std::vector<float> expected =
              acc_alone(kernels, pv.p.row(watched), pv.values, pv.before_row(watched));
          for (int j = 0; j < pv.values.num_tokens(); ++j)
            if (pv.p.row(watched)[j] == 0.0f)
              for (int b = 0; b < 2; ++b) {
                pv.values.put(j, b, random_block(random));
                const f16_t odd[] = {0x7e00, 0x7c00, 0xfc00, 0x7bff, 0x7c01, 0};
                if (step > 0 && random() % 4 == 0)
                  pv.values.set_scale(j, b, odd[random() % 6]);
              }
          const std::vector<float> acc = pv.run(kernels);
          EXPECT(same_bits(acc.data() + watched * 64, expected.data(), 64),
                 "rows %d tiles %d step %d", num_rows, num_tiles, step);
        }
  });
  check(isa + " pv_packed NaN and infinity reach the rows that see them, in their block", [&] {
    Random random(66);
    for (int num_rows : {1, 2, 4, 5})
      for (int num_tiles : {1, 2, 17})
        for (f16_t bad : {0x7e00, 0xfe00, 0x7c00, 0xfc00}) {
          PvCase pv(random, num_rows, num_tiles, 96, Order::dense);
          const int token = between(random, 0, pv.values.num_tokens() - 1);
          const int block = between(random, 0, 2);
          for (int r = 0; r < num_rows; ++r)
            pv.p.row(r)[token] = r % 2 ? 0.0f : r == 0 ? 0.5f : FLT_MIN;
          const std::vector<float> before = pv.run(kernels);
          block_q4_0 odd = pv.values.block(token, block);
          odd.d = bad;
          std::memset(odd.qs, 0x2a, sizeof odd.qs);
          pv.values.put(token, block, odd);
          const std::vector<float> after = pv.run(kernels);
          for (int r = 0; r < num_rows; ++r)
            for (int i = 0; i < 96; ++i) {
              const float x = after[size(r * 96 + i)];
              if (i / QK4_0 != block || r % 2)
                EXPECT(bits_of(x) == bits_of(before[size(r * 96 + i)]), "row %d dim %d", r, i);
              else if ((bad & 0x3ff) != 0)
                EXPECT(std::isnan(x), "row %d dim %d: %g", r, i, static_cast<double>(x));
              else // q is 10 in the first half of the block, 2 in the second
                EXPECT(x == ((i % QK4_0 < 16) == (bad == 0x7c00) ? kInf : -kInf),
                       "row %d dim %d: %g", r, i, static_cast<double>(x));
            }
        }
  });
  check(isa + " pv_packed without rows or tiles touches nothing", [&] {
    const Rows none = {nullptr, 0, nullptr};
    std::vector<float> p(32, 1.0f), acc(32, 5.0f), expected = acc;
    kernels.tiles_of(Format::q4_0)->pv(p.data(), 32, 1, &none, 0, 32, acc.data(), 32);
    kernels.tiles_of(Format::q4_0)->pv(p.data(), 32, 0, &none, 0, 32, acc.data(), 32);
    EXPECT(acc == expected, "wrote");
  });
}

// --- packed as f32, and keys side by side ------------------------------------------------------

void test_unpack(const std::string &isa, const Kernels &kernels) {
  // Zeros may have either sign, and so may NaN.
  const auto equal = [](float a, float b) { return a == b || (std::isnan(a) && std::isnan(b)); };
  for (Kind kind : {Kind::keys, Kind::values})
    check(isa + " unpack_packed_" + (kind == Kind::keys ? "keys" : "values") + " is exact", [&] {
      Random random(71);
      for (int dim = 32; dim <= 512; dim += 32)
        for (int step = 0; step < 4; ++step) {
          TileSet tiles(random, kind, 1, dim, Order::dense);
          for (int j = 0; j < kTokens && step > 0; ++j)
            for (int b = 0; b < tiles.num_blocks; ++b)
              tiles.set_scale(j, b, static_cast<f16_t>(step == 3 ? random() : random() & 0xbbff));
          Output<float> out(size(dim * kTokens), size(step));
          if (kind == Kind::keys)
            kernels.tiles_of(Format::q4_0)->keys_to_f32(tiles.tile(0), dim, out.data());
          else
            kernels.tiles_of(Format::q4_0)->values_to_f32(tiles.tile(0), dim, out.data());
          EXPECT(out.guards_intact(), "guards, dim %d", dim);
          for (int j = 0; j < kTokens; ++j)
            for (int i = 0; i < dim; ++i) {
              const block_q4_0 &block = tiles.block(j, i / QK4_0);
              float d;
              kernels_for("scalar").of(Format::f16).to_f32(&block.d, &d, 1);
              const std::uint8_t byte = block.qs[i % 16];
              const int q = i % QK4_0 < 16 ? byte & 15 : byte >> 4;
              const float want = static_cast<float>(q - 8) * d;
              const float got = out[size(kind == Kind::keys ? i * kTokens + j : j * dim + i)];
              EXPECT(equal(got, want), "dim %d token %d value %d: %.9g, not %.9g", dim, j, i,
                     static_cast<double>(got), static_cast<double>(want));
            }
        }
    });
}

void test_transposed(const std::string &isa, const Kernels &kernels) {
  const Kernels &scalar = kernels_for("scalar");
  for (Format type : {Format::f32, Format::f16, Format::q4_0})
    check(isa + " transpose_keys " + format_name(type), [&] {
      Random random(72);
      for (int dim : {1, 4, 17, 32, 80, 96, 128, 129, 160, 512, 544})
        for (int num_keys = 1; num_keys <= kTokens; ++num_keys) {
          if (type == Format::q4_0 && dim % QK4_0 != 0)
            continue;
          const std::size_t bytes = row_bytes(type, size(dim));
          const std::size_t element = type == Format::f32 ? 4 : 2;
          const Order order = kOrders[(num_keys + dim) % 3];
          const std::size_t stride = bytes + (order == Order::dense ? 0 : 3 * element);
          const int stored = order == Order::indexed ? 2 * num_keys + 1 : num_keys;
          std::vector<std::int32_t> index;
          for (int j = 0; order == Order::indexed && j < num_keys; ++j)
            index.push_back(between(random, 0, stored - 1));
          // The allocation ends with the last row's last byte.
          Input<char> rows(stride * size(stored - 1) + bytes, element * size(num_keys % 4));
          std::memset(rows.data(), 0xff, rows.size());
          std::vector<float> exact(size(stored * dim));
          for (int j = 0; j < stored; ++j) {
            float *values = exact.data() + j * dim;
            char *row = rows.data() + stride * size(j);
            for (int i = 0; i < dim; ++i)
              values[i] = normal(random);
            if (type == Format::f32) {
              std::memcpy(row, values, bytes);
            } else if (type == Format::f16) {
              scalar.of(Format::f16).from_f32(values, reinterpret_cast<f16_t *>(row), size(dim));
              scalar.of(Format::f16).to_f32(reinterpret_cast<f16_t *>(row), values, size(dim));
            } else {
              block_q4_0 *blocks = reinterpret_cast<block_q4_0 *>(row);
              scalar.of(Format::q4_0).from_f32(values, blocks, size(dim));
              scalar.of(Format::q4_0).to_f32(blocks, values, size(dim));
            }
          }
          const Rows k = {rows.data(), static_cast<std::ptrdiff_t>(stride),
                          index.empty() ? nullptr : index.data()};
          Output<float> kt(size(dim * kTokens), size(num_keys % 4));
          std::fill(kt.data(), kt.data() + kt.size(), kNan);
          kernels.of(type).transpose_keys(&k, num_keys, dim, kt.data());
          EXPECT(kt.guards_intact(), "guards, keys %d dim %d", num_keys, dim);
          for (int i = 0; i < dim; ++i)
            for (int j = 0; j < kTokens; ++j) {
              const int row = index.empty() || j >= num_keys ? j : index[size(j)];
              const float want = j < num_keys ? exact[size(row * dim + i)] : 0.0f;
              const float got = kt[size(i * kTokens + j)];
              EXPECT(got == want, "keys %d dim %d: key %d dim %d: %.9g, not %.9g", num_keys, dim, j,
                     i, static_cast<double>(got), static_cast<double>(want));
            }
        }
    });
  const auto run = [&](Random &random, int num_rows, int num_tiles, int dim) {
    const int num_keys = num_tiles * kTokens;
    Input<float> kt(size(num_keys * dim), size(between(random, 0, 3)));
    for (std::size_t i = 0; i < kt.size(); ++i)
      kt[i] = normal(random);
    FloatRows q(random, num_rows, dim, between(random, 0, 5));
    for (int r = 0; r < num_rows; ++r)
      for (int i = 0; i < dim; ++i)
        q.row(r)[i] = normal(random);
    const int bad_row = between(random, -1, num_rows - 1),
              bad_key = between(random, -1, num_keys - 1);
    if (bad_row >= 0)
      q.row(bad_row)[between(random, 0, dim - 1)] = kNan;
    if (bad_key >= 0)
      kt[size((bad_key / kTokens * dim + between(random, 0, dim - 1)) * kTokens +
              bad_key % kTokens)] = kNan;
    OutputRows scores(random, num_rows, num_keys, between(random, 0, 5));
    kernels.qk_transposed(q.row(0), q.ld, num_rows, kt.data(), num_tiles, dim, scores.row(0),
                          scores.ld);
    EXPECT(scores.untouched_between(), "guards: rows %d tiles %d dim %d", num_rows, num_tiles, dim);
    std::vector<float> alone(kTokens);
    for (int r = 0; r < num_rows; ++r) {
      for (int j = 0; j < num_keys; ++j) {
        double expected = 0, magnitude = 0;
        for (int i = 0; i < dim; ++i) {
          const double k = kt[size((j / kTokens * dim + i) * kTokens + j % kTokens)];
          expected += q.row(r)[i] * k;
          magnitude += std::fabs(q.row(r)[i] * k);
        }
        const float got = scores.row(r)[j];
        if (r == bad_row || j == bad_key)
          EXPECT(std::isnan(got), "row %d key %d: %g", r, j, static_cast<double>(got));
        else
          EXPECT(std::fabs(got - expected) <= dim * kUlp * magnitude,
                 "rows %d tiles %d dim %d: row %d key %d: %.9g, not %.9g", num_rows, num_tiles, dim,
                 r, j, static_cast<double>(got), expected);
      }
      const int t = between(random, 0, num_tiles - 1);
      kernels.qk_transposed(q.row(r), 0, 1, kt.data() + t * kTokens * dim, 1, dim, alone.data(), 0);
      if (r != bad_row && bad_key / kTokens != t)
        EXPECT(same_bits(alone.data(), scores.row(r) + t * kTokens, alone.size()),
               "rows %d tiles %d dim %d: row %d has other bits than alone", num_rows, num_tiles,
               dim, r);
    }
  };
  check(isa + " qk_transposed", [&] {
    Random random(73);
    for (int dim : {1, 4, 17, 32, 80, 96, 128, 129, 512})
      for (int num_rows = 1; num_rows <= 13; ++num_rows)
        run(random, num_rows, between(random, 1, 6), dim);
    for (int num_tiles = 1; num_tiles <= 10; ++num_tiles)
      for (int num_rows : {1, 9, 32, 33})
        run(random, num_rows, num_tiles, 64);
  });
  check(isa + " qk_transposed without rows or tiles touches nothing", [&] {
    std::vector<float> q(32, 1.0f), out(32, 5.0f), expected = out;
    kernels.qk_transposed(q.data(), 32, 1, nullptr, 0, 32, out.data(), 16);
    kernels.qk_transposed(q.data(), 32, 0, q.data(), 1, 2, out.data(), 16);
    EXPECT(out == expected, "wrote");
  });
}

void test_rows_at_once() {
  for (Kind kind : {Kind::keys, Kind::values})
    check(std::string("row plane of packed ") + (kind == Kind::keys ? "keys" : "values") +
              ": rows at once are rows one by one",
          [&] {
            Random random(45);
            constexpr int kCells = 53, kHeads = 2;
            for (int step = 0; step < 60; ++step) {
              const int width = step % 2 ? 64 : 160;
              const Format type = step % 3 ? Format::f16 : Format::f32;
              const RowPlane rows(kind, type, width, kHeads, kCells);
              const RowPlane plane(kind, Format::q4_0, width, kHeads, kCells);
              std::vector<char> source(rows.bytes());
              for (int head = 0; head < kHeads; ++head)
                for (int cell = 0; cell < kCells; ++cell) {
                  std::vector<float> values(size(width));
                  for (float &x : values)
                    x = normal(random);
                  rows.put(source.data(), head, cell, Format::f32, values.data());
                }
              std::vector<char> expected(plane.bytes());
              for (char &byte : expected)
                byte = static_cast<char>(random());
              std::vector<char> got = expected;
              std::vector<std::int32_t> from(kCells), to(kCells);
              std::iota(from.begin(), from.end(), 0);
              std::iota(to.begin(), to.end(), 0);
              std::shuffle(from.begin(), from.end(), random);
              if (step % 4 == 0)
                std::shuffle(to.begin(), to.end(), random);
              const int begin = between(random, 0, kCells), n = between(random, 0, kCells - begin);
              if (n > 1 && step % 5 == 0)
                to[size(begin + 1)] = to[size(begin)]; // the last one stays
              const int head = step % kHeads;
              for (int i = begin; i < begin + n; ++i)
                plane.copy(expected.data(), head, to[size(i)], rows, source.data(), from[size(i)]);
              plane.copy_rows(got.data(), head, to.data() + begin, n, rows, source.data(),
                              from.data() + begin);
              EXPECT(got == expected, "step %d, %d rows", step, n);
            }
          });
}

// --- packing -----------------------------------------------------------------------------------

/// A row of f32 or f16 values, some of its blocks of the kinds that need care.
std::vector<char> row_to_pack(Random &random, Format type, int dim) {
  std::vector<float> values(size(dim));
  for (float &x : values)
    x = normal(random);
  for (int b = 0; b < dim; b += QK4_0)
    switch (between(random, 0, 11)) {
    case 0: // the largest magnitude with either sign
      values[size(b + between(random, 0, 15))] = 5.0f;
      values[size(b + between(random, 16, 31))] = -5.0f;
      break;
    case 1:
      values[size(b + between(random, 0, 31))] = random() % 2 ? kNan : -kInf;
      break;
    case 2:
      std::fill_n(values.begin() + b, QK4_0, random() % 2 ? -0.0f : 0.0f);
      break;
    case 3: // all of one sign
      for (int i = 0; i < QK4_0; ++i)
        values[size(b + i)] = std::copysign(values[size(b + i)], b % 64 ? 1.0f : -1.0f);
      break;
    case 4: // subnormal, as f16 too
      for (int i = 0; i < QK4_0; ++i)
        values[size(b + i)] *= type == Format::f32 && random() % 2 ? 1e-40f : 1e-7f;
      break;
    default:
      break;
    }
  std::vector<char> row(row_bytes(type, size(dim)));
  if (type == Format::f32)
    std::memcpy(row.data(), values.data(), row.size());
  else
    kernels_for("scalar")
        .of(Format::f16)
        .from_f32(values.data(), reinterpret_cast<f16_t *>(row.data()), size(dim));
  return row;
}

/// Every set of tokens of some: all, none, one, a half, all but one, any.
std::uint32_t some_tokens(Random &random, int step) {
  const std::uint32_t all = (1u << kTokens) - 1, one = 1u << between(random, 0, kTokens - 1);
  const std::uint32_t sets[] = {
      all, 0, one, 0xffu, 0xff00u, all & ~one, static_cast<std::uint32_t>(random()) & all};
  return sets[step % 7];
}

void test_pack(const std::string &isa, const Kernels &kernels) {
  for (Kind kind : {Kind::keys, Kind::values})
    for (Format type : {Format::f32, Format::f16})
      check(isa + " pack_" + (kind == Kind::keys ? "keys " : "values ") + format_name(type), [&] {
        Random random(91);
        const Kernels &scalar = kernels_for("scalar");
        for (int step = 0; step < 140; ++step) {
          const int dims[] = {32, 64, 96, 128, 160, 256, 544};
          const int dim = dims[step / 7 % 7], num_blocks = dim / QK4_0;
          const std::uint32_t set = some_tokens(random, step);
          std::vector<std::vector<char>> storage;
          const void *rows[kTokens] = {};
          for (int t = 0; t < kTokens; ++t) {
            storage.push_back(row_to_pack(random, type, dim));
            rows[t] = set >> t & 1 ? storage.back().data() : nullptr;
          }
          Output<unsigned char> tile(tile_bytes(Format::q4_0, size(dim)),
                                     2 * size(between(random, 0, 7)));
          for (std::size_t i = 0; i < tile.size(); ++i)
            tile[i] = static_cast<unsigned char>(random());
          // By the layout's own definition, token by token.
          std::vector<unsigned char> expected(tile.data(), tile.data() + tile.size());
          for (int t = 0; t < kTokens; ++t) {
            std::vector<block_q4_0> blocks(size(num_blocks));
            if (rows[t] == nullptr)
              continue;
            if (type == Format::f32)
              scalar.of(Format::q4_0)
                  .from_f32(static_cast<const float *>(rows[t]), blocks.data(), size(dim));
            else
              scalar.of(Format::q4_0)
                  .from_f16(static_cast<const f16_t *>(rows[t]), blocks.data(), size(dim));
            pack(kind, blocks.data(), 0, num_blocks, num_blocks, expected.data(), t);
          }
          const TileKernels &tiles = *kernels.tiles_of(Format::q4_0);
          const auto of_f32 = kind == Kind::keys ? tiles.pack_keys_f32 : tiles.pack_values_f32;
          const auto of_f16 = kind == Kind::keys ? tiles.pack_keys_f16 : tiles.pack_values_f16;
          (type == Format::f32 ? of_f32 : of_f16)(rows, dim, tile.data());
          EXPECT(std::memcmp(tile.data(), expected.data(), expected.size()) == 0,
                 "dim %d, tokens %04x", dim, set);
          EXPECT(tile.guards_intact(), "guards, dim %d, tokens %04x", dim, set);
        }
      });
}

} // namespace

int main(int argc, char **argv) {
  if (argc > 1)
    name_filter = argv[1];
  test_layout();
  test_row_plane();
  test_rows_at_once();
  for (const IsaInfo &isa : compiled_isas()) {
    if (!isa.available) {
      std::printf("SKIP %s: needs %s, which this machine lacks\n", isa.name, isa.requires_);
      continue;
    }
    const Kernels &kernels = kernels_for(isa.name);
    test_qk_packed(isa.name, kernels);
    test_pv_packed(isa.name, kernels);
    test_unpack(isa.name, kernels);
    test_transposed(isa.name, kernels);
    test_pack(isa.name, kernels);
  }
  return summary();
}
