// Tiles of NL3: numbers of three bits, four of five of which lie in the lower bits of nibbles, the
// others in the nibbles' top bits, so that one look-up of nibbles opens both.
//
// Keys: as nibble_tile.h has them, with the three words of a block's bytes:
//
//   [block][word w of 3][token]  4 bytes
//
// Values: of a block's 32 dims there are 32 words and then 16. Byte p of a word is of token p of
// four, in the order 0, 2, 1, 3 (byte_tile.h). Word i: tokens 0 to 3 in the low nibbles, 4 to 7 in
// the high ones. Word 32 + i: tokens 8 to 11, in its low nibbles those of dim i, in its high ones
// those of dim 16 + i. Tokens 12 to 15 are in top bits: bits 0 and 1 in those of the low and of the
// high nibble of word i, bit 2 in that of the nibble of word 32 + i % 16.
//
//   [block]([dim of 32]  4 bytes, [dim of 16]  4 bytes)
#pragma once

#include "formats/byte_tile.h"

#include <string.h>

namespace mixedkv {

enum : int {
  kNl3CodeBytes = 12,
  /// Bytes of codes that one block of each of a tile's tokens takes.
  kNl3BlockBytes = kTileTokens * kNl3CodeBytes,
};

/// Where bit `bit` of a token's value i is in the bytes of a block of values, counted in bits.
static inline int nl3_place(int i, int token, int bit) {
  const int a = (i * 4 + byte_of_token(token)) * 8;
  const int b = ((32 + i % 16) * 4 + byte_of_token(token)) * 8 + i / 16 * 4;
  if (token < 12)
    return (token < 4 ? a : token < 8 ? a + 4 : b) + bit;
  return bit == 0 ? a + 3 : bit == 1 ? a + 7 : b + 3;
}

static inline int nl3_value(const unsigned char *block, int i, int token) {
  int value = 0;
  for (int bit = 0; bit < 3; ++bit) {
    const int place = nl3_place(i, token, bit);
    value |= (block[place / 8] >> place % 8 & 1) << bit;
  }
  return value;
}

static inline void set_nl3_value(unsigned char *block, int i, int token, int value) {
  for (int bit = 0; bit < 3; ++bit) {
    const int place = nl3_place(i, token, bit);
    const int kept = block[place / 8] & ~(1 << place % 8);
    block[place / 8] = static_cast<unsigned char>(kept | (value >> bit & 1) << place % 8);
  }
}

/// Value i of a block of a row: byte j < 12 holds value j in the lower bits of its low nibble and
/// value 16 + j in those of its high one; bit k of values 12 + j and 28 + j, for j < 4, is the top
/// bit of the low and of the high nibble of byte 4 k + j.
static inline int nl3_row_value(const unsigned char *qs, int i) {
  const int j = i % 16, shift = i / 16 * 4;
  if (j < 12)
    return qs[j] >> shift & 7;
  int value = 0;
  for (int bit = 0; bit < 3; ++bit)
    value |= (qs[4 * bit + j - 12] >> (shift + 3) & 1) << bit;
  return value;
}

/// Of bytes that were zeros.
static inline void put_nl3_row_value(unsigned char *qs, int i, int value) {
  const int j = i % 16, shift = i / 16 * 4;
  if (j < 12)
    qs[j] = static_cast<unsigned char>(qs[j] | value << shift);
  for (int bit = 0; bit < 3 && j >= 12; ++bit)
    qs[4 * bit + j - 12] =
        static_cast<unsigned char>(qs[4 * bit + j - 12] | (value >> bit & 1) << (shift + 3));
}

} // namespace mixedkv
