#include "formats/tile_layout.h"

#include "formats/byte_tile.h"
#include "formats/nibble_tile.h"
#include "formats/nl3_tile.h"

#include <cstdint>
#include <cstring>

namespace mixedkv {
namespace {

/// Block: {f16 d; 16 bytes of nibbles, or twice that}, first, count and num_blocks likewise. Flip:
/// what values' nibbles are changed by in tiles.
template <typename Block, std::uint8_t Flip> struct NibbleTile {
  static constexpr int kCodes = sizeof(Block::qs);
  static constexpr int kWords = kCodes / 4;
  static constexpr int kBlock = 2 * kCodes;

  static void put_keys(const void *from, int first, int count, int num_blocks, unsigned char *tile,
                       int token) {
    const Block *blocks = static_cast<const Block *>(from);
    for (int i = 0; i < count; ++i) {
      unsigned char *words = tile + (first + i) * kCodes * kTileTokens + token * 4;
      for (int w = 0; w < kWords; ++w) {
        std::memcpy(words + w * 4 * kTileTokens, blocks[i].qs + 4 * w, 4);
      }
      *tile_scale(tile, kCodes, num_blocks, first + i, token) = blocks[i].d;
    }
  }

  static void get_keys(const unsigned char *tile, int num_blocks, int token, int first, int count,
                       void *to) {
    Block *blocks = static_cast<Block *>(to);
    for (int i = 0; i < count; ++i) {
      const unsigned char *words = tile + (first + i) * kCodes * kTileTokens + token * 4;
      for (int w = 0; w < kWords; ++w) {
        std::memcpy(blocks[i].qs + 4 * w, words + w * 4 * kTileTokens, 4);
      }
      blocks[i].d = *tile_scale(tile, kCodes, num_blocks, first + i, token);
    }
  }

  /// Of the words of a block's values, the one whose value is the low nibble of byte j; the high
  /// one's is half of 32 further on.
  static constexpr int low_word(int j) { return j + j / kNibbleCodeBytes * kNibbleCodeBytes; }

  static void put_values(const void *from, int first, int count, int num_blocks,
                         unsigned char *tile, int token) {
    const Block *blocks = static_cast<const Block *>(from);
    const int shift = nibble_shift(token);
    const std::uint32_t keep = ~(15u << shift);
    unsigned char *words = tile + (token / 8 * num_blocks + first) * kBlock * 4;
    for (int i = 0; i < count; ++i, words += kBlock * 4) {
      std::uint32_t block[kBlock];
      std::memcpy(block, words, sizeof block);
      for (int j = 0; j < kCodes; ++j) {
        const std::uint32_t byte = blocks[i].qs[j] ^ std::uint32_t{Flip};
        std::uint32_t &low = block[low_word(j)], &high = block[low_word(j) + kNibbleCodeBytes];
        low = (low & keep) | (byte & 15u) << shift;
        high = (high & keep) | byte >> 4 << shift;
      }
      std::memcpy(words, block, sizeof block);
      *tile_scale(tile, kCodes, num_blocks, first + i, token) = blocks[i].d;
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
      for (int j = 0; j < kCodes; ++j) {
        const std::uint32_t low = block[low_word(j)] >> shift & 15u;
        const std::uint32_t high = block[low_word(j) + kNibbleCodeBytes] >> shift & 15u;
        blocks[i].qs[j] = static_cast<std::uint8_t>((low | high << 4) ^ Flip);
      }
      blocks[i].d = *tile_scale(tile, kCodes, num_blocks, first + i, token);
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

struct Nl3Tile {
  static void put_keys(const void *from, int first, int count, int num_blocks, unsigned char *tile,
                       int token) {
    const block_nl3 *blocks = static_cast<const block_nl3 *>(from);
    for (int b = 0; b < count; ++b) {
      for (int w = 0; w < 3; ++w) {
        std::memcpy(tile + (((first + b) * 3 + w) * kTileTokens + token) * 4, blocks[b].qs + 4 * w,
                    4);
      }
      *tile_scale(tile, kNl3CodeBytes, num_blocks, first + b, token) = blocks[b].d;
    }
  }

  static void get_keys(const unsigned char *tile, int num_blocks, int token, int first, int count,
                       void *to) {
    block_nl3 *blocks = static_cast<block_nl3 *>(to);
    for (int b = 0; b < count; ++b) {
      for (int w = 0; w < 3; ++w) {
        std::memcpy(blocks[b].qs + 4 * w, tile + (((first + b) * 3 + w) * kTileTokens + token) * 4,
                    4);
      }
      blocks[b].d = *tile_scale(tile, kNl3CodeBytes, num_blocks, first + b, token);
    }
  }

  static void put_values(const void *from, int first, int count, int num_blocks,
                         unsigned char *tile, int token) {
    const block_nl3 *blocks = static_cast<const block_nl3 *>(from);
    for (int b = 0; b < count; ++b) {
      for (int i = 0; i < QNL3; ++i) {
        set_nl3_value(tile + (first + b) * kNl3BlockBytes, i, token,
                      nl3_row_value(blocks[b].qs, i));
      }
      *tile_scale(tile, kNl3CodeBytes, num_blocks, first + b, token) = blocks[b].d;
    }
  }

  static void get_values(const unsigned char *tile, int num_blocks, int token, int first, int count,
                         void *to) {
    block_nl3 *blocks = static_cast<block_nl3 *>(to);
    for (int b = 0; b < count; ++b) {
      std::memset(blocks[b].qs, 0, sizeof blocks[b].qs);
      for (int i = 0; i < QNL3; ++i) {
        put_nl3_row_value(blocks[b].qs, i,
                          nl3_value(tile + (first + b) * kNl3BlockBytes, i, token));
      }
      blocks[b].d = *tile_scale(tile, kNl3CodeBytes, num_blocks, first + b, token);
    }
  }
};

template <typename T>
constexpr TileLayout kLayoutOf = {T::put_keys, T::get_keys, T::put_values, T::get_values};

} // namespace

const TileLayout *tile_layout(Format format) {
  switch (format) {
  case Format::q4_0:
    return &kLayoutOf<NibbleTile<block_q4_0, 0x88>>;
  case Format::q8_0:
    return &ByteTile<block_q8_0>::kLayout;
  case Format::iq4_nl:
    return &kLayoutOf<NibbleTile<block_iq4_nl, 0>>;
  case Format::nl4:
    return &kLayoutOf<NibbleTile<block_nl4, 0>>;
  case Format::nl3:
    return &kLayoutOf<Nl3Tile>;
  default:
    return nullptr;
  }
}

} // namespace mixedkv
