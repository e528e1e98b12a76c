#include "row_storage.h"

#include "../quantize.h"
#include "parallel_rows.h"

#include <algorithm>
#include <new>

namespace mixedkv {
namespace {

constexpr std::size_t kAlignment = 64;
/// Longest run of zeros that a conversion is given at once; a multiple of every block.
constexpr std::size_t kZeros = 256;

void put_zeros(KvType from, KvType to, char *row, std::size_t n) noexcept {
  alignas(64) static constexpr char zeros[kZeros * sizeof(float)] = {};
  for (std::size_t i = 0; i < n; i += kZeros) {
    convert_row(from, zeros, to, row + row_bytes(to, i), std::min(kZeros, n - i));
  }
}

} // namespace

RowStorage::RowStorage(const RowShape &shape, std::int64_t num_cells)
    : shape_(shape), num_bytes_(shape.bytes_per_cell() * static_cast<std::size_t>(num_cells)),
      k_row_stride_(static_cast<std::ptrdiff_t>(shape.k_row_bytes())),
      v_row_stride_(static_cast<std::ptrdiff_t>(shape.v_row_bytes())),
      k_head_stride_(k_row_stride_ * num_cells), v_head_stride_(v_row_stride_ * num_cells),
      v_begin_(k_head_stride_ * shape.num_kv_heads),
      layer_stride_(v_begin_ + v_head_stride_ * shape.num_kv_heads), data_(nullptr) {
  // calloc: the system hands out zeroed pages without touching them before they are needed.
  allocation_.reset(std::calloc(num_bytes_ + kAlignment, 1));
  if (!allocation_) {
    throw std::bad_alloc();
  }
  void *p = allocation_.get();
  std::size_t space = num_bytes_ + kAlignment;
  data_ = static_cast<char *>(std::align(kAlignment, num_bytes_, p, space));
}

KeySegment RowStorage::segment(int layer, std::int64_t first_cell) const {
  KeySegment segment;
  segment.k = k_row(layer, 0, first_cell);
  segment.v = v_row(layer, 0, first_cell);
  segment.k_type = shape_.k_type;
  segment.v_type = shape_.v_type;
  segment.k_head_stride = k_head_stride_;
  segment.k_row_stride = k_row_stride_;
  segment.v_head_stride = v_head_stride_;
  segment.v_row_stride = v_row_stride_;
  return segment;
}

void RowStorage::put_k(int layer, int head, std::int64_t cell, KvType from,
                       const void *row) noexcept {
  convert_row(from, row, shape_.k_type, k_row(layer, head, cell),
              static_cast<std::size_t>(shape_.head_dim));
}

void RowStorage::put_v(int layer, int head, std::int64_t cell, KvType from,
                       const void *row) noexcept {
  convert_row(from, row, shape_.v_type, v_row(layer, head, cell),
              static_cast<std::size_t>(shape_.head_dim_v));
}

void RowStorage::get_k(int layer, int head, std::int64_t cell, float *row) const noexcept {
  convert_row(shape_.k_type, k_row(layer, head, cell), KvType::f32, row,
              static_cast<std::size_t>(shape_.head_dim));
}

void RowStorage::get_v(int layer, int head, std::int64_t cell, float *row) const noexcept {
  convert_row(shape_.v_type, v_row(layer, head, cell), KvType::f32, row,
              static_cast<std::size_t>(shape_.head_dim_v));
}

void RowStorage::copy_head(const RowStorage &from, int from_layer, const std::int32_t *from_cells,
                           int layer, const std::int32_t *to_cells, std::int64_t n,
                           int head) noexcept {
  for (std::int64_t i = 0; i < n; ++i) {
    put_k(layer, head, to_cells[i], from.shape_.k_type,
          from.k_row(from_layer, head, from_cells[i]));
  }
  for (std::int64_t i = 0; i < n; ++i) {
    put_v(layer, head, to_cells[i], from.shape_.v_type,
          from.v_row(from_layer, head, from_cells[i]));
  }
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

void RowStorage::zero_layer(int layer, KvType from_k, KvType from_v, const std::int32_t *cells,
                            std::int64_t n) noexcept {
  for (int head = 0; head < shape_.num_kv_heads; ++head) {
    for (std::int64_t i = 0; i < n; ++i) {
      put_zeros(from_k, shape_.k_type, k_row(layer, head, cells[i]),
                static_cast<std::size_t>(shape_.head_dim));
      put_zeros(from_v, shape_.v_type, v_row(layer, head, cells[i]),
                static_cast<std::size_t>(shape_.head_dim_v));
    }
  }
}

} // namespace mixedkv
