// Tiles of formats whose codes are nibbles, 16 bytes a block of 32 as ggml has them: byte j holds
// value j in its low nibble and value j + 16 in its high one.
//
// Keys: lanes are tokens, so that products add up within a lane and no vector is ever summed
// across. For block b of a row, bytes 4w to 4w + 3 (dims 4w + i in the low nibbles, 16 + 4w + i in
// the high ones) are one 32-bit word, and word w of all tokens lies side by side:
//
//   [block][word w of 4][token]  4 bytes
//
// Values: lanes are dims. A 32-bit word holds one dim of eight tokens. Tokens 2k and 2k + 1 are
// nibbles k and k + 4: the k-th nibbles of a word's two halves make a pair for instructions that
// multiply pairs of 16-bit numbers, whose weights then lie in token order. Q4_0's nibbles are in
// two's complement there (ggml's with the top bit flipped), so that an arithmetic shift yields a
// signed number:
//
//   [token / 8][dim]  4 bytes
#pragma once

#include "formats/token_tile.h"

namespace mixedkv {

enum : int {
  kNibbleCodeBytes = 16,
  /// Bytes of nibbles that one block of each of a tile's tokens takes.
  kNibbleBlockBytes = kTileTokens * kNibbleCodeBytes,
};

static inline f16_t *nibble_scale(unsigned char *tile, int num_blocks, int block, int token) {
  return tile_scale(tile, kNibbleCodeBytes, num_blocks, block, token);
}
static inline const f16_t *nibble_scale(const unsigned char *tile, int num_blocks, int block,
                                        int token) {
  return tile_scale(tile, kNibbleCodeBytes, num_blocks, block, token);
}

/// Bits that token's nibble is shifted by in a word of values.
static inline int nibble_shift(int token) { return token % 8 / 2 * 4 + token % 2 * 16; }

} // namespace mixedkv
