// What cold keys are stored less of. Keys of neighbours point in much the same direction, and the
// part that they share costs a quantised format most of its range: each page of kCenterCells cells
// keeps one vector a head, the mean of the keys that came first, and its keys are stored less that
// vector. Nothing rests on its being a mean: q . (k - c) + q . c is q . k for any c.
#pragma once

#include "mixedkv/attention.h"
#include "mixedkv/formats.h"

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <vector>

namespace mixedkv {

/// Different layers and heads may be written by several threads at once. Nothing here allocates but
/// the constructor.
class KeyCenters {
public:
  /// Widest keys: a tile's rows pass through the stack.
  enum : int { kMaxWidth = 1024 };

  KeyCenters() = default; ///< of no cells
  /// width <= kMaxWidth. Throws std::bad_alloc.
  KeyCenters(int num_layers, int num_heads, int width, std::int64_t num_cells);

  std::size_t bytes() const { return values_.capacity() * sizeof(f16_t) + chosen_.capacity(); }
  /// [width]; those of a head's pages follow one another, heads lie head_stride() values apart.
  const f16_t *of(int layer, int head, std::int64_t page) const {
    return values_.data() + offset(layer, head, page);
  }
  std::ptrdiff_t head_stride() const { return num_pages_ * width_; }

  /// A page's centers are chosen anew when keys next come, in every layer.
  void forget(std::int64_t page) noexcept;
  /// Chooses the centers of those pages of cells[0 .. n) that have none: the mean of the keys that
  /// come to the page now, row(i, values) giving that of cells[i] as f32. Keys that are not finite
  /// don't count.
  template <typename F>
  void choose(int layer, int head, const std::int32_t *cells, std::int64_t n, F &&row) noexcept;
  /// values -= center, values += center of a cell's page.
  void subtract(int layer, int head, std::int64_t cell, float *values) const noexcept;
  void add(int layer, int head, std::int64_t cell, float *values) const noexcept;

private:
  /// A mean in the making.
  class Mean {
  public:
    explicit Mean(int width);
    void take(const float *values) noexcept;
    void round_to(f16_t *center) noexcept;

  private:
    std::size_t width_;
    std::int64_t count_ = 0;
    alignas(64) float sum_[kMaxWidth];
  };

  std::size_t offset(int layer, int head, std::int64_t page) const {
    return static_cast<std::size_t>((unit(layer, head) * num_pages_ + page) * width_);
  }
  std::int64_t unit(int layer, int head) const { return std::int64_t{layer} * num_heads_ + head; }
  std::uint8_t &chosen(std::int64_t page, int layer, int head) {
    return chosen_[static_cast<std::size_t>(page * num_units_ + unit(layer, head))];
  }

  int num_heads_ = 0;
  std::int64_t width_ = 0;
  std::int64_t num_units_ = 0; ///< (layer, head)
  std::int64_t num_pages_ = 0;
  std::vector<f16_t> values_;        ///< [layer][head][page][width]
  std::vector<std::uint8_t> chosen_; ///< [page][layer][head]
};

template <typename F>
void KeyCenters::choose(int layer, int head, const std::int32_t *cells, std::int64_t n,
                        F &&row) noexcept {
  alignas(64) float values[kMaxWidth];
  for (std::int64_t i = 0; i < n; ++i) {
    const std::int64_t page = cells[i] / kCenterCells;
    if (chosen(page, layer, head) != 0) {
      continue;
    }
    Mean mean(static_cast<int>(width_));
    int most = kCenterCells; // of them no more lie in the page
    for (std::int64_t j = i; j < n && most > 0; ++j) {
      if (cells[j] / kCenterCells == page) {
        row(j, values);
        mean.take(values);
        --most;
      }
    }
    mean.round_to(values_.data() + offset(layer, head, page));
    chosen(page, layer, head) = 1;
  }
}

} // namespace mixedkv
