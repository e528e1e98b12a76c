#include "attention/check_keys.h"

#include "attention/key_run.h"

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <stdexcept>
#include <string>

namespace mixedkv {
namespace {

[[noreturn]] void refuse(const std::string &message) { throw std::invalid_argument(message); }

std::string entry(const char *list, std::int64_t j, std::int64_t value) {
  return std::string(list) + "[" + std::to_string(j) + "] = " + std::to_string(value);
}

void check_index(const std::int32_t *index, std::int64_t len) {
  if (index[0] < 0) {
    refuse("an index must not be negative, got " + entry("index", 0, index[0]));
  }
  bool ascends = true;
  for (std::int64_t j = 1; j < len; ++j) {
    ascends &= index[j] > index[j - 1];
  }
  for (std::int64_t j = 1; j < len && !ascends; ++j) {
    if (index[j] <= index[j - 1]) {
      refuse("an index must ascend strictly, got " + entry("index", j - 1, index[j - 1]) + " and " +
             entry("index", j, index[j]));
    }
  }
}

/// Whether rows, or tiles, of pages up to most can be named in 32 bits.
bool countable(std::int64_t most, std::int64_t last_row, std::ptrdiff_t page_stride,
               std::ptrdiff_t row_stride) {
  const std::ptrdiff_t unit = page_unit(page_stride, row_stride);
  // In floating point, where nothing overflows; what it rounds off is far below the bound.
  const auto steps = [&](std::int64_t n, std::ptrdiff_t stride) {
    return static_cast<double>(n) * std::fabs(static_cast<double>(stride / unit));
  };
  const double furthest = steps(most, page_stride) + steps(last_row, row_stride);
  return furthest < static_cast<double>(std::numeric_limits<std::int32_t>::max());
}

void check_pages(const KeySegment &segment) {
  if (segment.index != nullptr) {
    refuse("keys are named by an index or by pages, got both");
  }
  const bool tiles = segment.k_layout == Layout::tiles || segment.v_layout == Layout::tiles;
  const std::int64_t size = segment.page_size;
  if (size < 1 || (tiles && size % kTileTokens != 0)) {
    refuse("page_size must be " + std::string(tiles ? "a multiple of 16" : "1 or more") + ", got " +
           std::to_string(size));
  }
  const std::int64_t num_pages = (segment.len + size - 1) / size;
  std::int32_t most = 0;
  for (std::int64_t i = 0; i < num_pages; ++i) {
    if (segment.pages[i] < 0) {
      refuse("a page must not be negative, got " + entry("pages", i, segment.pages[i]));
    }
    most = std::max(most, segment.pages[i]);
  }
  const auto last = [&](Layout layout) {
    return layout == Layout::tiles ? size / kTileTokens - 1 : size - 1;
  };
  if (!countable(most, last(segment.k_layout), segment.k_page_stride, segment.k_row_stride) ||
      !countable(most, last(segment.v_layout), segment.v_page_stride, segment.v_row_stride)) {
    refuse("pages are too far apart: rows from page 0 to page " + std::to_string(most) +
           " must be fewer than 2^31 steps of their strides' common divisor");
  }
}

} // namespace

void check_keys(const KeySegment &segment) {
  if (segment.len < 0) {
    refuse("a segment's len must be 0 or more, got " + std::to_string(segment.len));
  }
  if (segment.len == 0) {
    return;
  }
  if (segment.pages != nullptr) {
    check_pages(segment);
  } else if (segment.index != nullptr) {
    check_index(segment.index, segment.len);
  }
}

} // namespace mixedkv
