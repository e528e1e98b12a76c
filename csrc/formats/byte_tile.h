// Tiles of formats whose codes are signed bytes, one a value, 32 a block. Here their top bits are
// flipped: bytes from 0 to 255, which is how instructions of x86 take one of two factors.
//
// Keys: as nibble_tile.h has them, with eight words a block: word w of a token holds dims 4w to
// 4w + 3:
//
//   [block][word w of 8][token]  4 bytes
//
// Values: a 32-bit word holds one dim of four tokens, in the order 0, 2, 1, 3, so that its even and
// its odd bytes are pairs of tokens that follow one another:
//
//   [token / 4][dim]  4 bytes
#pragma once

#include "formats/token_tile.h"

namespace mixedkv {

enum : int { kByteCodeBytes = 32 };

/// Which byte of a word of values is token's.
static inline int byte_of_token(int token) { return token % 4 / 2 + token % 2 * 2; }

} // namespace mixedkv
