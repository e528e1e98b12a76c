// Packed Q4_0: the same bits as ggml's rows of blocks, laid out as attention reads them. A tile
// holds one head's rows of kPackedTokens tokens and takes as many bytes as they do in ggml's order.
//
// Keys: lanes are tokens, so that products add up within a lane and no vector is ever summed
// across. For block b of a row, bytes 4w to 4w + 3 of its qs (dims 4w + i in the low nibbles,
// 16 + 4w + i in the high ones) are one 32-bit word, and word w of all tokens lies side by side:
//
//   [block][word w of 4][token]  4 bytes      then      [block][token]  f16 scale
//
// Values: lanes are dims. A 32-bit word holds one dim of eight tokens, nibbles in two's complement
// (ggml's with the top bit flipped), so that an arithmetic shift yields a signed number. Tokens 2k
// and 2k + 1 are nibbles k and k + 4: the k-th nibbles of a word's two halves make a pair for
// instructions that multiply pairs of 16-bit numbers, whose weights then lie in token order:
//
//   [token / 8][dim]  4 bytes      then      [block][token]  f16 scale
#pragma once

#include "mixedkv/formats.h"

#include <string.h>

namespace mixedkv {

enum : int {
  kPackedTokens = 16,
  /// Bytes of nibbles and of scales that one block of each of a tile's tokens takes.
  kPackedBlockBytes = kPackedTokens * QK4_0 / 2,
  kPackedScaleBytes = kPackedTokens * 2,
};

/// Bytes of a tile of rows of n values, n a multiple of QK4_0.
static constexpr size_t packed_tile_bytes(size_t n) {
  return n / QK4_0 * (kPackedBlockBytes + kPackedScaleBytes);
}

/// Floats that a prepared query row takes (kernels.h); what they hold is an ISA's own affair.
static constexpr size_t packed_query_floats(size_t n) { return n + 16; }

static inline f16_t *packed_scale(unsigned char *tile, int num_blocks, int block, int token) {
  return reinterpret_cast<f16_t *>(tile + num_blocks * kPackedBlockBytes +
                                   block * kPackedScaleBytes) +
         token;
}
static inline const f16_t *packed_scale(const unsigned char *tile, int num_blocks, int block,
                                        int token) {
  return packed_scale(const_cast<unsigned char *>(tile), num_blocks, block, token);
}

// Blocks first to first + count - 1 of a token's row, into a tile of rows of num_blocks and back.

static inline void pack_key_blocks(const block_q4_0 *blocks, int first, int count, int num_blocks,
                                   unsigned char *tile, int token) {
  for (int i = 0; i < count; ++i) {
    unsigned char *words = tile + (first + i) * kPackedBlockBytes + token * 4;
    for (int w = 0; w < 4; ++w) {
      memcpy(words + w * 4 * kPackedTokens, blocks[i].qs + 4 * w, 4);
    }
    *packed_scale(tile, num_blocks, first + i, token) = blocks[i].d;
  }
}

static inline void unpack_key_blocks(const unsigned char *tile, int num_blocks, int token,
                                     int first, int count, block_q4_0 *blocks) {
  for (int i = 0; i < count; ++i) {
    const unsigned char *words = tile + (first + i) * kPackedBlockBytes + token * 4;
    for (int w = 0; w < 4; ++w) {
      memcpy(blocks[i].qs + 4 * w, words + w * 4 * kPackedTokens, 4);
    }
    blocks[i].d = *packed_scale(tile, num_blocks, first + i, token);
  }
}

/// Bits that token's nibble is shifted by in a word of values.
static inline int packed_value_shift(int token) { return token % 8 / 2 * 4 + token % 2 * 16; }

static inline void pack_value_blocks(const block_q4_0 *blocks, int first, int count, int num_blocks,
                                     unsigned char *tile, int token) {
  const int shift = packed_value_shift(token);
  const uint32_t keep = ~(15u << shift);
  unsigned char *words = tile + (token / 8 * num_blocks + first) * QK4_0 * 4;
  for (int i = 0; i < count; ++i, words += QK4_0 * 4) {
    uint32_t block[QK4_0];
    memcpy(block, words, sizeof block);
    for (int j = 0; j < QK4_0 / 2; ++j) {
      const uint32_t byte = blocks[i].qs[j] ^ 0x88u;
      block[j] = (block[j] & keep) | (byte & 15u) << shift;
      block[j + QK4_0 / 2] = (block[j + QK4_0 / 2] & keep) | byte >> 4 << shift;
    }
    memcpy(words, block, sizeof block);
    *packed_scale(tile, num_blocks, first + i, token) = blocks[i].d;
  }
}

static inline void unpack_value_blocks(const unsigned char *tile, int num_blocks, int token,
                                       int first, int count, block_q4_0 *blocks) {
  const int shift = packed_value_shift(token);
  const unsigned char *words = tile + (token / 8 * num_blocks + first) * QK4_0 * 4;
  for (int i = 0; i < count; ++i, words += QK4_0 * 4) {
    uint32_t block[QK4_0];
    memcpy(block, words, sizeof block);
    for (int j = 0; j < QK4_0 / 2; ++j) {
      const uint32_t low = block[j] >> shift & 15u;
      const uint32_t high = block[j + QK4_0 / 2] >> shift & 15u;
      blocks[i].qs[j] = static_cast<unsigned char>((low | high << 4) ^ 0x88u);
    }
    blocks[i].d = *packed_scale(tile, num_blocks, first + i, token);
  }
}

} // namespace mixedkv
