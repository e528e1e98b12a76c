// Tiles of Q4_0: the layout against its description, bit by bit, then packing and unpacking by
// every instruction set that this machine can run, bit by bit.
//
// Usage: test_tile_layout [part of a check's name]

#include "tile_cases.h"

using namespace mixedkv;
using namespace testing;

namespace {

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

// --- tiles as f32 --------------------------------------------------------------------------------

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
  on_each_isa([](const std::string &isa, const Kernels &kernels) {
    test_unpack(isa, kernels);
    test_pack(isa, kernels);
  });
  return summary();
}
