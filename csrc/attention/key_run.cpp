#include "attention/key_run.h"

#include <algorithm>
#include <numeric>

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
  const Place k{static_cast<const char *>(segment.k) + kv_head_ * segment.k_head_stride,
                segment.k_layout, segment.k_row_stride, segment.k_page_stride};
  const Place v{static_cast<const char *>(segment.v) + kv_head_ * segment.v_head_stride,
                segment.v_layout, segment.v_row_stride, segment.v_page_stride};
  if (segment.pages != nullptr) {
    keys_ = find_in_pages(k, k_rows_);
    values_ = find_in_pages(v, v_rows_);
  } else {
    keys_ = find(k);
    values_ = find(v);
  }
}

void KeyRun::find_tiles(std::int64_t end) {
  if (segment_->pages != nullptr) {
    lead_ = static_cast<int>(begin_ % kTileTokens); // pages begin with a tile
    num_tiles_ = (lead_ + size_ + kTileTokens - 1) / kTileTokens;
    const std::int64_t tiles = (end + kTileTokens - 1) / kTileTokens - begin_ / kTileTokens;
    num_tiles_ahead_ = static_cast<int>(std::min<std::int64_t>(kTilesAhead, tiles - num_tiles_));
    return;
  }
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

Rows KeyRun::find(const Place &place) const {
  if (place.layout == Layout::tiles) {
    if (listed_) {
      return {place.data, place.row_stride, tiles_, num_tiles_ahead_};
    }
    const std::int64_t first = (segment_->first_cell + begin_) / kTileTokens;
    return {place.data + first * place.row_stride, place.row_stride, nullptr};
  }
  if (segment_->index == nullptr) {
    return {place.data + begin_ * place.row_stride, place.row_stride, nullptr};
  }
  const std::int32_t *index = segment_->index + begin_;
  // They ascend, so equal ends mean an unbroken run.
  if (index[size_ - 1] - index[0] == size_ - 1) {
    return {place.data + index[0] * place.row_stride, place.row_stride, nullptr};
  }
  return {place.data, place.row_stride, index};
}

std::ptrdiff_t page_unit(std::ptrdiff_t page_stride, std::ptrdiff_t row_stride) {
  if (row_stride != 0 && page_stride % row_stride == 0) {
    return row_stride;
  }
  const std::ptrdiff_t unit = std::gcd(page_stride, row_stride);
  return unit != 0 ? unit : 1;
}

/// Rows, or tiles, of the run from page to page; list receives them where they are not one after
/// the other in memory.
Rows KeyRun::find_in_pages(const Place &place, std::int32_t *list) const {
  const bool tiles = place.layout == Layout::tiles;
  const int keys = tiles ? kTileTokens : 1;
  const std::int64_t per_page = segment_->page_size / keys;
  const std::int64_t first = begin_ / keys;
  int count = tiles ? num_tiles_ : size_;
  const std::int32_t *page = segment_->pages + first / per_page;
  std::int64_t row = first % per_page;
  const std::int64_t num_pages = (row + count + per_page - 1) / per_page;

  bool unbroken = num_pages == 1 || place.page_stride == per_page * place.row_stride;
  for (std::int64_t i = 1; i < num_pages && unbroken; ++i) {
    unbroken = page[i] == page[0] + i;
  }
  if (unbroken) {
    return {place.data + page[0] * place.page_stride + row * place.row_stride, place.row_stride,
            nullptr};
  }
  const int ahead = tiles ? num_tiles_ahead_ : 0;
  count += ahead;
  const std::ptrdiff_t unit = page_unit(place.page_stride, place.row_stride);
  const std::int64_t page_step = place.page_stride / unit;
  const std::int64_t row_step = place.row_stride / unit;
  for (std::int64_t i = 0; i < count; row = 0, ++page) {
    const std::int64_t n = std::min(count - i, per_page - row);
    std::int64_t next = *page * page_step + row * row_step;
    for (std::int64_t end = i + n; i < end; ++i, next += row_step) {
      list[i] = static_cast<std::int32_t>(next);
    }
  }
  return {place.data, unit, list, ahead};
}

} // namespace mixedkv
