#include "mixedkv/convert.h"

#include "kernels/dispatch.h"
#include "rows/row_parts.h"
#include "runtime/parallel.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>
#include <limits>
#include <mutex>

namespace mixedkv {
namespace {

/// Rows that one unit of work takes: some 16k values, so that a unit outweighs its hand-out.
std::int64_t rows_per_unit(std::size_t n) {
  return std::max<std::int64_t>(1, 16384 / static_cast<std::int64_t>(std::max<std::size_t>(n, 1)));
}

const char *row_at(const ConstRowsView &view, std::int64_t i) {
  return static_cast<const char *>(view.data) + i * view.stride;
}

/// Whether no value of n in blocks can leave f16's range, as their scales alone tell: a value is a
/// scale times a level of eight bits.
bool fits_f16_by_scales(Format type, const char *row, std::size_t n) {
  constexpr f16_t k512 = 0x6000; // 128 times what is below is 65504 at most
  const FormatInfo &info = format_info(type);
  const char *end = row + row_bytes(type, n);
  int largest = 0;
  for (; row < end; row += info.block_bytes) {
    f16_t scale;
    std::memcpy(&scale, row, sizeof scale);
    largest = std::max(largest, scale & 0x7fff);
  }
  return largest < k512;
}

} // namespace

void convert_row(Format from, const void *x, Format to, void *y, std::size_t n, bool fit_scales) {
  const Kernels &kernels = active_kernels();
  const RowKernels &target = kernels.of(to);
  const bool fit = fit_scales && target.fit_f32 != nullptr;
  const auto of_f32 = fit ? target.fit_f32 : target.from_f32;
  const auto of_f16 = fit ? target.fit_f16 : target.from_f16;
  if (from == to) {
    std::memcpy(y, x, row_bytes(from, n));
  } else if (from == Format::f32) {
    of_f32(static_cast<const float *>(x), y, n);
  } else if (from == Format::f16) {
    of_f16(static_cast<const f16_t *>(x), y, n);
  } else if (to == Format::f32) {
    kernels.of(from).to_f32(x, static_cast<float *>(y), n);
  } else if (to == Format::f16) {
    kernels.of(from).to_f16(x, static_cast<f16_t *>(y), n);
  } else {
    // Through f32, which holds every format's values, a part of the row at a time.
    constexpr std::size_t kPart = 256; // whole blocks of every format
    float part[kPart];
    for (std::size_t i = 0; i < n; i += kPart) {
      const std::size_t count = std::min(kPart, n - i);
      kernels.of(from).to_f32(static_cast<const char *>(x) + row_bytes(from, i), part, count);
      of_f32(part, static_cast<char *>(y) + row_bytes(to, i), count);
    }
  }
}

std::optional<RowValue> find_unkept(const ConstRowsView &x, std::int64_t num_rows, std::size_t n,
                                    Format to, int num_threads) {
  const FormatInfo &from = format_info(x.type);
  const FormatInfo &target = format_info(to);
  const bool fits =
      target.overflow == 0.0 || (from.overflow != 0.0 && from.overflow <= target.overflow);
  if (n == 0 || x.type == to || (target.plain() && fits)) {
    return std::nullopt;
  }
  const Kernels &kernels = active_kernels();
  const double limit = target.overflow;
  const auto kept = [&](const float *values, std::size_t count) {
    return (fits || kernels.largest_magnitude(values, count) < limit) &&
           (target.plain() || kernels.all_finite_f32(values, count));
  };
  const auto is_unkept = [&](float value) {
    return std::isfinite(value) ? !fits && std::fabs(value) >= limit : !target.plain();
  };
  const bool by_scales = to == Format::f16 && !from.plain();
  const bool as_f16 = x.type == Format::f16 && fits; // which has a look of its own
  const auto width = static_cast<std::int64_t>(n);
  const bool side_by_side = x.stride == static_cast<std::ptrdiff_t>(row_bytes(x.type, n));
  // As one row, where they lie so: kernels like them long, and two looks at the first-level cache.
  const std::int64_t at_once = side_by_side ? std::max<std::int64_t>(1, 4096 / width) : 1;
  const std::int64_t step = rows_per_unit(n);
  std::mutex mutex;
  std::atomic<std::int64_t> first{std::numeric_limits<std::int64_t>::max()}; // row * n + column
  float value = 0.0f;
  parallel_for((num_rows + step - 1) / step, num_threads, [&](std::int64_t unit) {
    const std::int64_t end = std::min(num_rows, (unit + 1) * step);
    for (std::int64_t i = unit * step; i < end && i * width < first.load(); i += at_once) {
      const char *row = row_at(x, i);
      const auto count = static_cast<std::size_t>(std::min(at_once, end - i)) * n;
      if (as_f16 && kernels.all_finite_f16(reinterpret_cast<const f16_t *>(row), count)) {
        continue;
      }
      if (by_scales && fits_f16_by_scales(x.type, row, count)) {
        continue;
      }
      std::int64_t place = i * width;
      each_part(x.type, row, count, [&](const float *values, std::size_t part) {
        const float *bad =
            kept(values, part) ? values + part : std::find_if(values, values + part, is_unkept);
        if (bad != values + part) {
          const std::lock_guard<std::mutex> lock(mutex);
          if (place + (bad - values) < first.load()) {
            first.store(place + (bad - values));
            value = *bad;
          }
        }
        place += static_cast<std::int64_t>(part);
      });
    }
  });
  const std::int64_t place = first.load();
  if (place == std::numeric_limits<std::int64_t>::max()) {
    return std::nullopt;
  }
  return RowValue{place / width, place % width, value};
}

void convert_rows(const ConstRowsView &x, const MutableRowsView &y, std::int64_t num_rows,
                  std::size_t n, int num_threads, bool fit_scales) {
  const std::int64_t step = rows_per_unit(n);
  const bool side_by_side = x.stride == static_cast<std::ptrdiff_t>(row_bytes(x.type, n)) &&
                            y.stride == static_cast<std::ptrdiff_t>(row_bytes(y.type, n));
  parallel_for((num_rows + step - 1) / step, num_threads, [&](std::int64_t unit) {
    const std::int64_t end = std::min(num_rows, (unit + 1) * step);
    if (side_by_side) { // as one row: kernels like them long
      const std::int64_t i = unit * step;
      convert_row(x.type, row_at(x, i), y.type, static_cast<char *>(y.data) + i * y.stride,
                  n * static_cast<std::size_t>(end - i), fit_scales);
      return;
    }
    for (std::int64_t i = unit * step; i < end; ++i) {
      convert_row(x.type, row_at(x, i), y.type, static_cast<char *>(y.data) + i * y.stride, n,
                  fit_scales);
    }
  });
}

} // namespace mixedkv
