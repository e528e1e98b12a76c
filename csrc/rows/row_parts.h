// The values of a row of any format, a part of the row at a time.
#pragma once

#include "mixedkv/convert.h"

#include <algorithm>
#include <cstddef>

namespace mixedkv {

/// Calls look(values, count) on n values of a row as f32, as many at a time as are had without
/// memory of their own.
template <typename F> void each_part(Format type, const char *row, std::size_t n, F &&look) {
  if (type == Format::f32) {
    look(reinterpret_cast<const float *>(row), n);
    return;
  }
  constexpr std::size_t kPart = 256; // whole blocks of every format
  float part[kPart];
  for (std::size_t i = 0; i < n; i += kPart) {
    const std::size_t count = std::min(kPart, n - i);
    convert_row(type, row + row_bytes(type, i), Format::f32, part, count);
    look(part, count);
  }
}

} // namespace mixedkv
