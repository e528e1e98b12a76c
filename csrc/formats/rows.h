// Rows of one head in memory, as kernels take them. Kernels have row_at and rows_from of their own
// (kernels/loops/rows.inl), which are inlined whatever the compiler thinks of it.
#pragma once

#include <cstddef>
#include <cstdint>

namespace mixedkv {

/// Row j starts at base + stride * (index ? index[j] : j); stride in bytes.
struct Rows {
  const void *base;
  std::ptrdiff_t stride;
  const std::int32_t *index;
  /// So many more entries of index follow those that a call is about: rows that come next, to be
  /// asked for ahead of their turn.
  std::int32_t num_ahead = 0;
};

} // namespace mixedkv
