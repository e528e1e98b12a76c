// Blocks into tiles and back, of every format that has tiles: plain loops, for single tokens.
#pragma once

#include "mixedkv/formats.h"

namespace mixedkv {

/// Blocks first to first + count - 1 of a token's row, into a tile of rows of num_blocks and back.
struct TileLayout {
  using Put = void(const void *blocks, int first, int count, int num_blocks, unsigned char *tile,
                   int token);
  using Get = void(const unsigned char *tile, int num_blocks, int token, int first, int count,
                   void *blocks);
  Put *put_keys;
  Get *get_keys;
  Put *put_values;
  Get *get_values;
};

/// Null where the format has no tiles.
const TileLayout *tile_layout(Format format);

} // namespace mixedkv
