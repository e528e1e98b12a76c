// Rows of a head, as attention finds them in a segment.
#pragma once

#include "formats/rows.h"
#include "kernels/kernels.h"

#include <cstddef>
#include <cstdint>

namespace mixedkv {

inline const void *row_at(const Rows &rows, int j) {
  return static_cast<const char *>(rows.base) +
         rows.stride * (rows.index != nullptr ? rows.index[j] : j);
}

/// The rows from row j on.
inline Rows rows_from(const Rows &rows, int j) {
  if (rows.index != nullptr) {
    return {rows.base, rows.stride, rows.index + j};
  }
  return {static_cast<const char *>(rows.base) + rows.stride * j, rows.stride, nullptr};
}

/// Rows [begin, begin + n) of a kv head.
inline Rows rows_of_head(const void *base, std::ptrdiff_t head_stride, std::ptrdiff_t row_stride,
                         const std::int32_t *index, int kv_head, std::int64_t begin, int n) {
  const char *data = static_cast<const char *>(base) + kv_head * head_stride;
  if (index == nullptr) {
    return {data + begin * row_stride, row_stride, nullptr};
  }
  index += begin;
  // Cells are listed in ascending order, so equal ends mean an unbroken run.
  if (index[n - 1] - index[0] == n - 1) {
    return {data + index[0] * row_stride, row_stride, nullptr};
  }
  return {data, row_stride, index};
}

} // namespace mixedkv
