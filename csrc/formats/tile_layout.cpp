#include "formats/tile_layout.h"

#include "formats/byte_tile.h"
#include "formats/nibble_tile.h"

#include <cstdint>
#include <cstring>

namespace mixedkv {
namespace {

/// Block: {f16 d; 16 bytes of nibbles}. Flip: what values' nibbles are changed by in tiles.
template <typename Block, std::uint8_t Flip> struct NibbleTile {
  static constexpr int kBlock = 2 * kNibbleCodeBytes;

  static void put_keys(const void *from, int first, int count, int num_blocks, unsigned char *tile,
                       int token) {
    const Block *blocks = static_cast<const Block *>(from);
    for (int i = 0; i < count; ++i) {
      unsigned char *words = tile + (first + i) * kNibbleBlockBytes + token * 4;
      for (int w = 0; w < 4; ++w) {
        std::memcpy(words + w * 4 * kTileTokens, blocks[i].qs + 4 * w, 4);
      }
      *nibble_scale(tile, num_blocks, first + i, token) = blocks[i].d;
    }
  }

  static void get_keys(const unsigned char *tile, int num_blocks, int token, int first, int count,
                       void *to) {
    Block *blocks = static_cast<Block *>(to);
    for (int i = 0; i < count; ++i) {
      const unsigned char *words = tile + (first + i) * kNibbleBlockBytes + token * 4;
      for (int w = 0; w < 4; ++w) {
        std::memcpy(blocks[i].qs + 4 * w, words + w * 4 * kTileTokens, 4);
      }
      blocks[i].d = *nibble_scale(tile, num_blocks, first + i, token);
    }
  }

  static void put_values(const void *from, int first, int count, int num_blocks,
                         unsigned char *tile, int token) {
    const Block *blocks = static_cast<const Block *>(from);
    const int shift = nibble_shift(token);
    const std::uint32_t keep = ~(15u << shift);
    unsigned char *words = tile + (token / 8 * num_blocks + first) * kBlock * 4;
    for (int i = 0; i < count; ++i, words += kBlock * 4) {
      std::uint32_t block[kBlock];
      std::memcpy(block, words, sizeof block);
      for (int j = 0; j < kBlock / 2; ++j) {
        const std::uint32_t byte = blocks[i].qs[j] ^ std::uint32_t{Flip};
        block[j] = (block[j] & keep) | (byte & 15u) << shift;
        block[j + kBlock / 2] = (block[j + kBlock / 2] & keep) | byte >> 4 << shift;
      }
      std::memcpy(words, block, sizeof block);
      *nibble_scale(tile, num_blocks, first + i, token) = blocks[i].d;
    }
  }

  static void get_values(const unsigned char *tile, int num_blocks, int token, int first, int count,
                         void *to) {
    Block *blocks = static_cast<Block *>(to);
    const int shift = nibble_shift(token);
    const unsigned char *words = tile + (token / 8 * num_blocks + first) * kBlock * 4;
    for (int i = 0; i < count; ++i, words += kBlock * 4) {
      std::uint32_t block[kBlock];
      std::memcpy(block, words, sizeof block);
      for (int j = 0; j < kBlock / 2; ++j) {
        const std::uint32_t low = block[j] >> shift & 15u;
        const std::uint32_t high = block[j + kBlock / 2] >> shift & 15u;
        blocks[i].qs[j] = static_cast<std::uint8_t>((low | high << 4) ^ Flip);
      }
      blocks[i].d = *nibble_scale(tile, num_blocks, first + i, token);
    }
  }
};

/// Block: {f16 d; 32 signed bytes}.
template <typename Block> struct ByteTile {
  static constexpr std::uint8_t kFlip = 0x80;

  /// Where value i of a token's block is.
  using Place = unsigned char *(unsigned char *tile, int num_blocks, int block, int i, int token);

  static unsigned char *key(unsigned char *tile, int /*num_blocks*/, int block, int i, int token) {
    return tile + (block * kByteCodeBytes + i / 4 * 4) * kTileTokens + token * 4 + i % 4;
  }
  static unsigned char *value(unsigned char *tile, int num_blocks, int block, int i, int token) {
    return tile + ((token / 4 * num_blocks + block) * kByteCodeBytes + i) * 4 +
           byte_of_token(token);
  }

  template <Place *At>
  static void put(const void *from, int first, int count, int num_blocks, unsigned char *tile,
                  int token) {
    const Block *blocks = static_cast<const Block *>(from);
    for (int b = 0; b < count; ++b) {
      for (int i = 0; i < kByteCodeBytes; ++i) {
        *At(tile, num_blocks, first + b, i, token) =
            static_cast<std::uint8_t>(blocks[b].qs[i]) ^ kFlip;
      }
      *tile_scale(tile, kByteCodeBytes, num_blocks, first + b, token) = blocks[b].d;
    }
  }

  template <Place *At>
  static void get(const unsigned char *tile, int num_blocks, int token, int first, int count,
                  void *to) {
    Block *blocks = static_cast<Block *>(to);
    for (int b = 0; b < count; ++b) {
      for (int i = 0; i < kByteCodeBytes; ++i) {
        blocks[b].qs[i] = static_cast<std::int8_t>(
            *At(const_cast<unsigned char *>(tile), num_blocks, first + b, i, token) ^ kFlip);
      }
      blocks[b].d = *tile_scale(tile, kByteCodeBytes, num_blocks, first + b, token);
    }
  }

  static constexpr TileLayout kLayout = {put<key>, get<key>, put<value>, get<value>};
};

template <typename T>
constexpr TileLayout kNibbleLayout = {T::put_keys, T::get_keys, T::put_values, T::get_values};

} // namespace

const TileLayout *tile_layout(Format format) {
  switch (format) {
  case Format::q4_0:
    return &kNibbleLayout<NibbleTile<block_q4_0, 0x88>>;
  case Format::q8_0:
    return &ByteTile<block_q8_0>::kLayout;
  case Format::iq4_nl:
    return &kNibbleLayout<NibbleTile<block_iq4_nl, 0>>;
  default:
    return nullptr;
  }
}

} // namespace mixedkv
