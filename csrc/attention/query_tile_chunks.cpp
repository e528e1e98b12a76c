// Which keys a tile takes at a time, and where packed ones lie.
#include "attention/query_tile.h"

#include "attention/row_runs.h"

#include <algorithm>

namespace mixedkv {

QueryTile::Chunk QueryTile::make_chunk(const KeySegment &segment, std::int64_t begin,
                                       std::int64_t end) {
  Chunk chunk{segment, begin,  static_cast<int>(std::min<std::int64_t>(chunk_keys_, end - begin)),
              0,       0,      false,
              false,   scores_};
  if (segment.k_layout == Layout::rows && segment.v_layout == Layout::rows) {
    return chunk;
  }
  if (segment.index == nullptr) {
    chunk.lead = static_cast<int>((segment.first_cell + begin) % kTileTokens);
    chunk.num_tiles = (chunk.lead + chunk.n + kTileTokens - 1) / kTileTokens;
    chunk.x = scores_ + chunk.lead;
    return chunk;
  }
  chunk.n = list_tiles(segment.index + begin, chunk.n, &chunk.num_tiles);
  list_tiles_ahead(segment.index + begin + chunk.n, segment.index + end, chunk.num_tiles);
  chunk.listed = true;
  chunk.lead = slots_[0];
  if (slots_[chunk.n - 1] - slots_[0] == chunk.n - 1) {
    chunk.x = scores_ + chunk.lead; // tiles anywhere, but no gap within or between them
  } else {
    chunk.scattered = true;
    chunk.x = gathered_;
  }
  return chunk;
}

/// Lists the tiles of up to n cells, as many as fit in a chunk, and where in them each cell is;
/// returns the number of cells.
int QueryTile::list_tiles(const std::int32_t *cells, int n, int *num_tiles) {
  const int most = chunk_keys_ / kTileTokens + 1;
  int count = 0;
  for (int j = 0; j < n; ++count) {
    if (count == most) {
      n = j;
      break;
    }
    const std::int32_t tile = cells[j] / kTileTokens;
    tiles_[count] = tile;
    const int slot = count * kTileTokens - tile * kTileTokens;
    const int rest = kTileTokens - cells[j] % kTileTokens;
    if (j + rest <= n &&
        cells[j + rest - 1] - cells[j] == rest - 1) { // all that follow in the tile
      const int first = slot + cells[j];
      for (int i = 0; i < rest; ++i) {
        slots_[j + i] = static_cast<std::uint16_t>(first + i);
      }
      j += rest;
      continue;
    }
    for (; j < n && cells[j] / kTileTokens == tile; ++j) {
      slots_[j] = static_cast<std::uint16_t>(slot + cells[j]);
    }
  }
  *num_tiles = count;
  return n;
}

/// Lists behind `count` tiles those that the cells after a chunk's lie in.
void QueryTile::list_tiles_ahead(const std::int32_t *cell, const std::int32_t *end, int count) {
  const int first = count;
  while (cell < end && count < first + kTilesAhead) {
    const std::int32_t tile = *cell / kTileTokens;
    if (tile != tiles_[count - 1]) {
      tiles_[count++] = tile;
    }
    // Cells ascend, so equal ends mean that all that follow in the tile are there.
    const int rest = kTileTokens - *cell % kTileTokens;
    cell += end - cell >= rest && cell[rest - 1] - *cell == rest - 1 ? rest : 1;
  }
  num_tiles_ahead_ = count - first;
}

Rows QueryTile::tiles_of(const Chunk &chunk, const void *base, std::ptrdiff_t head_stride,
                         std::ptrdiff_t tile_stride) const {
  const char *data = static_cast<const char *>(base) + kv_head_ * head_stride;
  if (chunk.listed) {
    return {data, tile_stride, tiles_, num_tiles_ahead_};
  }
  const std::int64_t first = (chunk.segment.first_cell + chunk.begin) / kTileTokens;
  return {data + first * tile_stride, tile_stride, nullptr};
}

} // namespace mixedkv
