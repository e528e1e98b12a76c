// Token tiles: the same bits as rows of blocks, laid out as attention reads them. A tile holds one
// head's rows of kTileTokens tokens and takes as many bytes as they do one by one. Codes come
// first, as the format has them in tiles, then the scales, one f16 a block, those of a block's
// tokens side by side:
//
//   [block][codes of all tokens]      then      [block][token]  f16 scale
//
// How codes lie stands with each format (nibble_tile.h).
#pragma once

#include "mixedkv/formats.h"

#include <stddef.h>
#include <stdint.h>

namespace mixedkv {

enum : int {
  kTileTokens = 16,
  /// Bytes that the scales of one block of each of a tile's tokens take.
  kTileScaleBytes = kTileTokens * 2,
};

/// Bytes of a tile of rows of n values.
static constexpr size_t tile_bytes(Format format, size_t n) {
  return kTileTokens * row_bytes(format, n);
}

/// Floats that a prepared query row takes (kernels.h); what they hold is an ISA's own affair.
static constexpr size_t tile_query_floats(size_t n) { return 2 * n; }

/// Where the scale of a token's block is; code_bytes: of a block, without its scale.
static inline f16_t *tile_scale(unsigned char *tile, int code_bytes, int num_blocks, int block,
                                int token) {
  return reinterpret_cast<f16_t *>(tile + num_blocks * kTileTokens * code_bytes +
                                   block * kTileScaleBytes) +
         token;
}
static inline const f16_t *tile_scale(const unsigned char *tile, int code_bytes, int num_blocks,
                                      int block, int token) {
  return tile_scale(const_cast<unsigned char *>(tile), code_bytes, num_blocks, block, token);
}

} // namespace mixedkv
