#include "cache/books/placement.h"

#include <algorithm>

namespace mixedkv {
namespace {

/// -1, 0 or 1: an order of sets of owners, whatever order.
int compare(const std::uint64_t *a, const std::uint64_t *b, std::size_t num_words) {
  const auto differ = std::mismatch(a, a + num_words, b);
  return differ.first == a + num_words ? 0 : *differ.first < *differ.second ? -1 : 1;
}

} // namespace

Placement::Placement(const Cells &cells) {
  if (cells.tile_cells() > 1) {
    pure_.reserve(static_cast<std::size_t>(cells.num_tiles()));
    mixed_.reserve(static_cast<std::size_t>(cells.num_tiles()));
  }
}

void Placement::begin(const Cells &cells) noexcept {
  pure_.clear();
  mixed_.clear();
  fresh_ = 0;
  if (cells.tile_cells() == 1) {
    return;
  }
  const std::size_t num_words = cells.words_per_cell();
  for (std::int32_t tile = cells.tile_of(cells.end() + cells.tile_cells() - 1) - 1; tile >= 0;
       --tile) {
    if (cells.num_used_in(tile) == 0 || cells.num_free_in(tile) == 0) {
      continue;
    }
    std::int32_t used = -1;
    bool pure = true;
    for (std::int32_t cell = cells.first_of(tile); cell < cells.end_of(tile) && pure; ++cell) {
      if (cells.in_use(cell)) {
        pure = used < 0 || compare(cells.owners(used), cells.owners(cell), num_words) == 0;
        used = cell;
      }
    }
    if (pure) {
      pure_.push_back({tile, used});
    } else {
      mixed_.push_back(tile);
    }
  }
  std::sort(pure_.begin(), pure_.end(), [&](const Tile &a, const Tile &b) {
    const int order = compare(cells.owners(a.cell), cells.owners(b.cell), num_words);
    return order != 0 ? order < 0 : a.number < b.number;
  });
}

std::int32_t Placement::find(Cells &cells, const std::uint64_t *owners) noexcept {
  if (cells.tile_cells() == 1) {
    return cells.lowest_free();
  }
  const std::size_t num_words = cells.words_per_cell();
  auto same = std::lower_bound(pure_.begin(), pure_.end(), owners,
                               [&](const Tile &tile, const std::uint64_t *wanted) {
                                 return compare(cells.owners(tile.cell), wanted, num_words) < 0;
                               });
  while (same != pure_.end() && compare(cells.owners(same->cell), owners, num_words) == 0) {
    if (cells.num_free_in(same->number) > 0) {
      return cells.lowest_free_in(same->number);
    }
    same = pure_.erase(same);
  }
  while (fresh_ < cells.num_tiles() && cells.num_used_in(fresh_) > 0) {
    ++fresh_;
  }
  if (fresh_ < cells.num_tiles()) {
    // Not more entries than tiles: those that were partly filled, and those that were free.
    const std::int32_t cell = cells.first_of(fresh_);
    pure_.insert(same, {fresh_, cell});
    return cell;
  }
  while (!mixed_.empty() && cells.num_free_in(mixed_.back()) == 0) {
    mixed_.pop_back();
  }
  if (mixed_.empty()) {
    // The one with most room, so that few others have to follow.
    const auto most =
        std::max_element(pure_.begin(), pure_.end(), [&](const Tile &a, const Tile &b) {
          return cells.num_free_in(a.number) < cells.num_free_in(b.number);
        });
    mixed_.push_back(most->number);
    pure_.erase(most);
  }
  return cells.lowest_free_in(mixed_.back());
}

std::size_t Placement::bytes() const {
  return pure_.capacity() * sizeof(pure_[0]) + mixed_.capacity() * sizeof(mixed_[0]);
}

} // namespace mixedkv
