// Whole-array row conversions on worker threads, with the checks that kernels leave out.
#pragma once

#include "mixedkv/export.h"
#include "mixedkv/formats.h"

#include <cstddef>
#include <cstdint>

namespace mixedkv {

/// Rows of n values; row i at data + i * stride (bytes).
struct ConstRowsView {
  const void *data = nullptr;
  Format type = Format::f32;
  std::ptrdiff_t stride = 0;
};
struct MutableRowsView {
  void *data = nullptr;
  Format type = Format::f32;
  std::ptrdiff_t stride = 0;
};

/// One row of n values from any type that has rows to any such type with the active kernels; same
/// type: a copy. Q4_0 sources and targets: n is a multiple of QK4_0. Never fails for a value.
MIXEDKV_API void convert_row(Format from, const void *x, Format to, void *y, std::size_t n);

/// True when every value of num_rows rows (f32 or f16) is finite.
MIXEDKV_API bool all_finite(const ConstRowsView &x, std::int64_t num_rows, std::size_t n,
                            int num_threads);

/// Converts num_rows rows of n values.
MIXEDKV_API void convert_rows(const ConstRowsView &x, const MutableRowsView &y,
                              std::int64_t num_rows, std::size_t n, int num_threads);

} // namespace mixedkv
