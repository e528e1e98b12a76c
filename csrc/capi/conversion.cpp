// Formats and conversion.
#include "capi/checks.h"

#include "mixedkv/convert.h"
#include "mixedkv/runtime.h"

#include <cmath>
#include <cstring>

namespace mixedkv::capi {
namespace {

// Their numbers are promised.
static_assert(static_cast<int>(Format::f32) == MIXEDKV_F32, "the C ABI's number");
static_assert(static_cast<int>(Format::f16) == MIXEDKV_F16, "the C ABI's number");
static_assert(static_cast<int>(Format::q4_0) == MIXEDKV_Q4_0, "the C ABI's number");

/// Rows of one side of a conversion.
void check_rows(const char *name, const char *stride_name, Format format, const void *data,
                std::ptrdiff_t stride) {
  const std::size_t alignment = row_alignment(format);
  check_pointer(name, data, alignment);
  check_multiple(stride_name, stride, static_cast<std::int64_t>(alignment));
}

[[noreturn]] void refuse_unkept(const RowValue &bad, Format target) {
  const auto row = static_cast<long long>(bad.row);
  const auto column = static_cast<long long>(bad.column);
  const auto value = static_cast<double>(bad.value);
  if (!std::isfinite(bad.value)) {
    refuse(MIXEDKV_INVALID_ARGUMENT,
           "x must be finite for %s, got %g at value %lld of row %lld; nothing was written",
           format_name(target), value, column, row);
  }
  refuse(
      MIXEDKV_INVALID_ARGUMENT,
      "x must have magnitudes below %.9g for %s, got %.9g at value %lld of row %lld; nothing was "
      "written",
      format_info(target).overflow, format_name(target), value, column, row);
}

void convert(mixedkv_format from, const void *x, std::ptrdiff_t x_stride, mixedkv_format to,
             void *y, std::ptrdiff_t y_stride, std::int64_t num_rows, std::int64_t n,
             std::uint32_t flags, std::int32_t num_threads) {
  const Format source = check_format("from", from);
  const Format target = check_format("to", to);
  check_range("num_rows", num_rows, 0, kMostLen);
  check_range("n", n, 0, kMostLen);
  check_width("n", n, source);
  check_width("n", n, target);
  check_flags("flags", flags, MIXEDKV_ALLOW_NON_FINITE | MIXEDKV_FIT_SCALES);
  const bool fit_scales = (flags & MIXEDKV_FIT_SCALES) != 0;
  if (fit_scales && !format_info(target).fits) {
    refuse(
        MIXEDKV_INVALID_ARGUMENT,
        "flags must be without MIXEDKV_FIT_SCALES where to is %s, whose blocks have no choice of "
        "scales, got %u",
        format_name(target), flags);
  }
  check_range("num_threads", num_threads, 0, kMostThreads);
  if (num_rows == 0 || n == 0) {
    return;
  }
  check_rows("x", "x_stride", source, x, x_stride);
  check_rows("y", "y_stride", target, y, y_stride);
  const auto width = static_cast<std::size_t>(n);
  if (num_rows > 1) {
    check_apart("y_stride", y_stride, static_cast<std::int64_t>(row_bytes(target, width)));
  }
  const int threads = num_threads > 0 ? num_threads : get_num_threads();
  const ConstRowsView rows{x, source, x_stride};
  if ((flags & MIXEDKV_ALLOW_NON_FINITE) == 0) {
    if (const auto bad = find_unkept(rows, num_rows, width, target, threads)) {
      refuse_unkept(*bad, target);
    }
  }
  convert_rows(rows, {y, target, y_stride}, num_rows, width, threads, fit_scales);
}

} // namespace
} // namespace mixedkv::capi

using namespace mixedkv;
using namespace mixedkv::capi;

int32_t mixedkv_format_count(void) { return kNumFormats; }

mixedkv_status mixedkv_get_format_info(mixedkv_format format, mixedkv_format_info *info) {
  return guarded([&] {
    const Format known = check_format("format", format);
    const FormatInfo &row = format_info(known);
    mixedkv_format_info own{};
    own.name = row.name;
    own.block_values = row.block_values;
    own.block_bytes = row.block_bytes;
    own.ggml_type = row.ggml_type;
    own.alignment = static_cast<int32_t>(row_alignment(known));
    own.overflow = row.overflow;
    write_struct("info", own, info, MIXEDKV_FIRST_SIZE(mixedkv_format_info, overflow));
  });
}

mixedkv_status mixedkv_format_by_name(const char *name, mixedkv_format *format) {
  return guarded([&] {
    check_pointer("name", name, 1);
    check_pointer("format", format, alignof(mixedkv_format));
    for (int i = 0; i < kNumFormats; ++i) {
      if (std::strcmp(name, kFormats[i].name) == 0) {
        *format = i;
        return;
      }
    }
    refuse(MIXEDKV_INVALID_ARGUMENT, "name must be a format's, got '%s'", name);
  });
}

mixedkv_status mixedkv_row_bytes(mixedkv_format format, int64_t n, size_t *bytes) {
  return guarded([&] {
    const Format known = check_format("format", format);
    check_range("n", n, 0, kMostLen);
    check_width("n", n, known);
    check_pointer("bytes", bytes, alignof(size_t));
    *bytes = row_bytes(known, static_cast<std::size_t>(n));
  });
}

mixedkv_status mixedkv_convert_rows(mixedkv_format from, const void *x, ptrdiff_t x_stride,
                                    mixedkv_format to, void *y, ptrdiff_t y_stride,
                                    int64_t num_rows, int64_t n, uint32_t flags,
                                    int32_t num_threads) {
  return guarded(
      [&] { convert(from, x, x_stride, to, y, y_stride, num_rows, n, flags, num_threads); });
}
