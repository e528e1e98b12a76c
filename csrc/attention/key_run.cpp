#include "attention/key_run.h"

#include <algorithm>

namespace mixedkv {

void KeyRun::take(const KeySegment &segment, std::int64_t begin, std::int64_t end) {
  segment_ = &segment;
  begin_ = begin;
  size_ = static_cast<int>(std::min<std::int64_t>(most_keys_, end - begin));
  num_tiles_ = num_tiles_ahead_ = lead_ = 0;
  listed_ = scattered_ = false;
  if (segment.k_layout == Layout::tiles || segment.v_layout == Layout::tiles) {
    find_tiles(end);
  }
  keys_ = find(segment.k, segment.k_layout, segment.k_head_stride, segment.k_row_stride);
  values_ = find(segment.v, segment.v_layout, segment.v_head_stride, segment.v_row_stride);
}

void KeyRun::find_tiles(std::int64_t end) {
  if (segment_->index == nullptr) {
    lead_ = static_cast<int>((segment_->first_cell + begin_) % kTileTokens);
    num_tiles_ = (lead_ + size_ + kTileTokens - 1) / kTileTokens;
    return;
  }
  listed_ = true;
  list_tiles(segment_->index + begin_);
  num_tiles_ahead_ = list_tiles_ahead(segment_->index + begin_ + size_, segment_->index + end);
  lead_ = slots_[0];
  scattered_ = slots_[size_ - 1] - slots_[0] != size_ - 1;
}

/// Lists the tiles of the cells, as many as fit in a run, and where in them each cell is.
void KeyRun::list_tiles(const std::int32_t *cells) {
  const int most = most_keys_ / kTileTokens + 1;
  int count = 0;
  for (int j = 0; j < size_; ++count) {
    if (count == most) {
      size_ = j;
      break;
    }
    const std::int32_t tile = cells[j] / kTileTokens;
    tiles_[count] = tile;
    const int slot = count * kTileTokens - tile * kTileTokens;
    const int rest = kTileTokens - cells[j] % kTileTokens;
    if (j + rest <= size_ &&
        cells[j + rest - 1] - cells[j] == rest - 1) { // all that follow in the tile
      const int first = slot + cells[j];
      for (int i = 0; i < rest; ++i) {
        slots_[j + i] = static_cast<std::uint16_t>(first + i);
      }
      j += rest;
      continue;
    }
    for (; j < size_ && cells[j] / kTileTokens == tile; ++j) {
      slots_[j] = static_cast<std::uint16_t>(slot + cells[j]);
    }
  }
  num_tiles_ = count;
}

/// Lists behind the run's tiles those that the cells after its own lie in; returns their number.
int KeyRun::list_tiles_ahead(const std::int32_t *cell, const std::int32_t *end) {
  int count = num_tiles_;
  while (cell < end && count < num_tiles_ + kTilesAhead) {
    const std::int32_t tile = *cell / kTileTokens;
    if (tile != tiles_[count - 1]) {
      tiles_[count++] = tile;
    }
    // Cells ascend, so equal ends mean that all that follow in the tile are there.
    const int rest = kTileTokens - *cell % kTileTokens;
    cell += end - cell >= rest && cell[rest - 1] - *cell == rest - 1 ? rest : 1;
  }
  return count - num_tiles_;
}

Rows KeyRun::find(const void *data, Layout layout, std::ptrdiff_t head_stride,
                  std::ptrdiff_t row_stride) const {
  const char *base = static_cast<const char *>(data) + kv_head_ * head_stride;
  if (layout == Layout::tiles) {
    if (listed_) {
      return {base, row_stride, tiles_, num_tiles_ahead_};
    }
    const std::int64_t first = (segment_->first_cell + begin_) / kTileTokens;
    return {base + first * row_stride, row_stride, nullptr};
  }
  if (segment_->index == nullptr) {
    return {base + begin_ * row_stride, row_stride, nullptr};
  }
  const std::int32_t *index = segment_->index + begin_;
  // They ascend, so equal ends mean an unbroken run.
  if (index[size_ - 1] - index[0] == size_ - 1) {
    return {base + index[0] * row_stride, row_stride, nullptr};
  }
  return {base, row_stride, index};
}

} // namespace mixedkv
