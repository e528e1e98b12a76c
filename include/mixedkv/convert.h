// Whole-array row conversions on worker threads, with the checks that kernels leave out.
#pragma once

#include "mixedkv/export.h"
#include "mixedkv/formats.h"

#include <cstddef>
#include <cstdint>
#include <optional>

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
/// fit_scales: of a target that can (FormatInfo::fits), scales by least squared error; of others it
/// changes nothing.
MIXEDKV_API void convert_row(Format from, const void *x, Format to, void *y, std::size_t n,
                             bool fit_scales = false);

/// A value of some rows, and where it is.
struct RowValue {
  std::int64_t row = 0;
  std::int64_t column = 0;
  float value = 0.0f;
};

/// The first value of num_rows rows of n, in their order, that rows of another format don't keep: a
/// finite one that would not stay finite there (FormatInfo::overflow), or, where they have blocks,
/// an infinity or a NaN, which would take its block along. nullopt where there is none; rows of x's
/// own format keep all.
MIXEDKV_API std::optional<RowValue> find_unkept(const ConstRowsView &x, std::int64_t num_rows,
                                                std::size_t n, Format to, int num_threads);

/// Converts num_rows rows of n values, each as convert_row does, whatever they are: what
/// find_unkept finds becomes infinite or NaN.
MIXEDKV_API void convert_rows(const ConstRowsView &x, const MutableRowsView &y,
                              std::int64_t num_rows, std::size_t n, int num_threads,
                              bool fit_scales = false);

} // namespace mixedkv
