// Rows of a head, as tile*.cpp find them in a segment. Kernels have row_at and rows_from of their
// own (kernels/attention.inl), which are inlined whatever the compiler thinks of it.
#pragma once

#include "kernels/kernels.h"
#include "mixedkv/formats.h"

#include <cstddef>
#include <cstdint>
#include <cstring>

namespace mixedkv {

inline bool is_packed(Format type) { return type == Format::q4_0_packed; }

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

/// A row of n values as f32.
inline void unpack_row(const Kernels &kernels, Format type, const void *x, float *y,
                       std::size_t n) {
  switch (type) {
  case Format::f32:
    std::memcpy(y, x, n * sizeof(float));
    break;
  case Format::f16:
    kernels.f16_to_f32(static_cast<const f16_t *>(x), y, n);
    break;
  case Format::q4_0:
    kernels.dequantize_row_q4_0_f32(static_cast<const block_q4_0 *>(x), y, n);
    break;
  case Format::q4_0_packed:
    break; // has no rows
  }
}

} // namespace mixedkv
