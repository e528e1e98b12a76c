#include "mixedkv/convert.h"

#include "kernels/dispatch.h"
#include "runtime/parallel.h"

#include <algorithm>
#include <atomic>
#include <cstring>

namespace mixedkv {
namespace {

/// Rows that one unit of work takes: some 16k values, so that a unit outweighs its hand-out.
std::int64_t rows_per_unit(std::size_t n) {
  return std::max<std::int64_t>(1, 16384 / static_cast<std::int64_t>(std::max<std::size_t>(n, 1)));
}

const char *row_at(const ConstRowsView &view, std::int64_t i) {
  return static_cast<const char *>(view.data) + i * view.stride;
}

} // namespace

void convert_row(Format from, const void *x, Format to, void *y, std::size_t n) {
  const Kernels &kernels = active_kernels();
  if (from == to) {
    std::memcpy(y, x, row_bytes(from, n));
  } else if (from == Format::f32) {
    kernels.of(to).from_f32(static_cast<const float *>(x), y, n);
  } else if (from == Format::f16) {
    kernels.of(to).from_f16(static_cast<const f16_t *>(x), y, n);
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
      kernels.of(to).from_f32(part, static_cast<char *>(y) + row_bytes(to, i), count);
    }
  }
}

bool all_finite(const ConstRowsView &x, std::int64_t num_rows, std::size_t n, int num_threads) {
  const Kernels &kernels = active_kernels();
  const std::int64_t step = rows_per_unit(n);
  std::atomic<bool> finite{true};
  parallel_for((num_rows + step - 1) / step, num_threads, [&](std::int64_t unit) {
    const std::int64_t end = std::min(num_rows, (unit + 1) * step);
    for (std::int64_t i = unit * step; i < end && finite.load(std::memory_order_relaxed); ++i) {
      const void *row = row_at(x, i);
      const bool ok = x.type == Format::f32
                          ? kernels.all_finite_f32(static_cast<const float *>(row), n)
                          : kernels.all_finite_f16(static_cast<const f16_t *>(row), n);
      if (!ok) {
        finite.store(false, std::memory_order_relaxed);
      }
    }
  });
  return finite.load();
}

void convert_rows(const ConstRowsView &x, const MutableRowsView &y, std::int64_t num_rows,
                  std::size_t n, int num_threads) {
  const std::int64_t step = rows_per_unit(n);
  const bool side_by_side = x.stride == static_cast<std::ptrdiff_t>(row_bytes(x.type, n)) &&
                            y.stride == static_cast<std::ptrdiff_t>(row_bytes(y.type, n));
  parallel_for((num_rows + step - 1) / step, num_threads, [&](std::int64_t unit) {
    const std::int64_t end = std::min(num_rows, (unit + 1) * step);
    if (side_by_side) { // as one row: kernels like them long
      const std::int64_t i = unit * step;
      convert_row(x.type, row_at(x, i), y.type, static_cast<char *>(y.data) + i * y.stride,
                  n * static_cast<std::size_t>(end - i));
      return;
    }
    for (std::int64_t i = unit * step; i < end; ++i) {
      convert_row(x.type, row_at(x, i), y.type, static_cast<char *>(y.data) + i * y.stride, n);
    }
  });
}

} // namespace mixedkv
