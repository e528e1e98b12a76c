#include "rows/row_storage.h"

#include "formats/token_tile.h"
#include "rows/parallel_rows.h"

#include <algorithm>
#include <new>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace mixedkv {
namespace {

constexpr std::size_t kAlignment = 64;

/// Attention streams through a tier at every step, and misses in the address translation cost as
/// much as misses in the cache: larger pages, where the system has them and the tier is large.
void advise_huge_pages(char *data, std::size_t bytes) {
#if defined(__linux__)
  constexpr std::uintptr_t page = std::uintptr_t{2} << 20;
  const std::uintptr_t begin = (reinterpret_cast<std::uintptr_t>(data) + page - 1) / page * page;
  const std::uintptr_t end = (reinterpret_cast<std::uintptr_t>(data) + bytes) / page * page;
  if (end > begin) {
    madvise(reinterpret_cast<void *>(begin), end - begin, MADV_HUGEPAGE); // a wish, no more
  }
#else
  (void)data;
  (void)bytes;
#endif
}

} // namespace

RowStorage::RowStorage(const RowShape &shape, std::int64_t num_cells)
    : shape_(shape), num_cells_(num_cells), k_(RowPlane::Kind::keys, shape.k_type, shape.head_dim,
                                               shape.num_kv_heads, num_cells, shape.fit_scales),
      v_(RowPlane::Kind::values, shape.v_type, shape.head_dim_v, shape.num_kv_heads, num_cells,
         shape.fit_scales),
      centers_(shape.center_keys
                   ? KeyCenters(shape.num_layers, shape.num_kv_heads, shape.head_dim, num_cells)
                   : KeyCenters()),
      layer_stride_(static_cast<std::ptrdiff_t>(k_.bytes() + v_.bytes())),
      num_bytes_(static_cast<std::size_t>(layer_stride_) *
                 static_cast<std::size_t>(shape.num_layers)),
      data_(nullptr) {
  // calloc: the system hands out zeroed pages without touching them before they are needed.
  allocation_.reset(std::calloc(num_bytes_ + kAlignment, 1));
  if (!allocation_) {
    throw std::bad_alloc();
  }
  void *p = allocation_.get();
  std::size_t space = num_bytes_ + kAlignment;
  data_ = static_cast<char *>(std::align(kAlignment, num_bytes_, p, space));
  advise_huge_pages(data_, num_bytes_);
}

KeySegment RowStorage::segment(int layer, std::int64_t first_cell) const {
  // Tiles are found by cell, from the first one on.
  const auto begin = [first_cell](const RowPlane &plane, const char *base) {
    return plane.layout() == Layout::tiles ? base : plane.row(base, 0, first_cell);
  };
  KeySegment segment;
  segment.k = begin(k_, k_base(layer));
  segment.v = begin(v_, v_base(layer));
  segment.k_format = k_.type();
  segment.v_format = v_.type();
  segment.k_layout = k_.layout();
  segment.v_layout = v_.layout();
  segment.k_head_stride = k_.head_stride();
  segment.k_row_stride = k_.stride();
  segment.v_head_stride = v_.head_stride();
  segment.v_row_stride = v_.stride();
  segment.first_cell = first_cell;
  if (shape_.center_keys) {
    segment.k_centers = centers_.of(layer, 0, 0);
    segment.k_center_head_stride = centers_.head_stride();
  }
  return segment;
}

void RowStorage::put_k(int layer, int head, const std::int32_t *cells, std::int64_t n, Format from,
                       const Rows &rows) noexcept {
  k_.put_rows(k_base(layer), head, cells, n, from, rows);
}

void RowStorage::put_v(int layer, int head, const std::int32_t *cells, std::int64_t n, Format from,
                       const Rows &rows) noexcept {
  v_.put_rows(v_base(layer), head, cells, n, from, rows);
}

void RowStorage::get_k(int layer, int head, std::int64_t cell, float *row) const noexcept {
  k_.get(k_base(layer), head, cell, row);
  if (shape_.center_keys) {
    centers_.add(layer, head, cell, row);
  }
}

void RowStorage::get_v(int layer, int head, std::int64_t cell, float *row) const noexcept {
  v_.get(v_base(layer), head, cell, row);
}

void RowStorage::get_stored_k(int layer, int head, std::int64_t cell, void *row) const noexcept {
  k_.get_stored(k_base(layer), head, cell, row);
}

void RowStorage::get_stored_v(int layer, int head, std::int64_t cell, void *row) const noexcept {
  v_.get_stored(v_base(layer), head, cell, row);
}

/// Row i, which row(i, values) gives as f32, becomes cell cells[i]'s, a tile at a time.
template <typename F>
void RowStorage::put_centered(int layer, int head, const std::int32_t *cells, std::int64_t n,
                              F &&row) noexcept {
  const std::size_t width = static_cast<std::size_t>(shape_.head_dim);
  centers_.choose(layer, head, cells, n, row);
  alignas(kAlignment) float rows[kTileTokens * KeyCenters::kMaxWidth];
  for (std::int64_t i = 0; i < n;) {
    std::int64_t count = 0;
    while (i + count < n && count < kTileTokens &&
           cells[i + count] / kTileTokens == cells[i] / kTileTokens) {
      float *values = rows + static_cast<std::size_t>(count) * width;
      row(i + count, values);
      centers_.subtract(layer, head, cells[i + count], values);
      ++count;
    }
    k_.put_rows(k_base(layer), head, cells + i, count, Format::f32,
                {rows, static_cast<std::ptrdiff_t>(width * sizeof(float)), nullptr});
    i += count;
  }
}

void RowStorage::copy_head(const RowStorage &from, int from_layer, const std::int32_t *from_cells,
                           int layer, const std::int32_t *to_cells, std::int64_t n,
                           int head) noexcept {
  if (shape_.center_keys) {
    put_centered(layer, head, to_cells, n, [&](std::int64_t i, float *values) {
      from.get_k(from_layer, head, from_cells[i], values);
    });
  } else {
    k_.copy_rows(k_base(layer), head, to_cells, n, from.k_, from.k_base(from_layer), from_cells);
  }
  v_.copy_rows(v_base(layer), head, to_cells, n, from.v_, from.v_base(from_layer), from_cells);
}

void RowStorage::copy_layer(const RowStorage &from, int from_layer, const std::int32_t *from_cells,
                            int layer, const std::int32_t *to_cells, std::int64_t n) noexcept {
  const std::int64_t values = n * shape_.num_kv_heads * shape_.values_per_row();
  parallel_rows(shape_.num_kv_heads, values, [&](std::int64_t head) {
    copy_head(from, from_layer, from_cells, layer, to_cells, n, static_cast<int>(head));
  });
}

void RowStorage::copy_cells(const RowStorage &from, const std::int32_t *from_cells,
                            const std::int32_t *to_cells, std::int64_t n) noexcept {
  const std::int64_t units = std::int64_t{shape_.num_layers} * shape_.num_kv_heads;
  parallel_rows(units, n * units * shape_.values_per_row(), [&](std::int64_t unit) {
    const int layer = static_cast<int>(unit / shape_.num_kv_heads);
    const int head = static_cast<int>(unit % shape_.num_kv_heads);
    copy_head(from, layer, from_cells, layer, to_cells, n, head);
  });
}

void RowStorage::zero_layer(int layer, Format from_k, Format from_v, const std::int32_t *cells,
                            std::int64_t n) noexcept {
  for (int head = 0; head < shape_.num_kv_heads; ++head) {
    if (shape_.center_keys) {
      put_centered(layer, head, cells, n, [&](std::int64_t, float *values) {
        std::fill_n(values, shape_.head_dim, 0.0f);
      });
    }
    for (std::int64_t i = 0; i < n; ++i) {
      if (!shape_.center_keys) {
        k_.put_zeros(k_base(layer), head, cells[i], from_k);
      }
      v_.put_zeros(v_base(layer), head, cells[i], from_v);
    }
  }
}

} // namespace mixedkv
