#include "rows/row_plane.h"

#include "formats/token_tile.h"
#include "kernels/dispatch.h"
#include "mixedkv/convert.h"

#include <algorithm>
#include <cstring>

namespace mixedkv {
namespace {

constexpr std::size_t kCacheLine = 64;
/// Values that pass through the stack at a time; a multiple of every block.
constexpr int kPart = 256;

} // namespace

RowPlane::RowPlane(Kind kind, Format type, int width, int num_heads, std::int64_t num_cells)
    : kind_(kind), type_(type), width_(width) {
  const std::size_t n = static_cast<std::size_t>(width);
  stride_ = static_cast<std::ptrdiff_t>(packed() ? packed_tile_bytes(n) : row_bytes(type, n));
  const std::int64_t num_rows =
      packed() ? (num_cells + kPackedTokens - 1) / kPackedTokens : num_cells;
  head_stride_ = stride_ * num_rows;
  bytes_ = (static_cast<std::size_t>(head_stride_) * static_cast<std::size_t>(num_heads) +
            kCacheLine - 1) /
           kCacheLine * kCacheLine;
}

const unsigned char *RowPlane::tile(const char *base, int head, std::int64_t cell) const {
  return reinterpret_cast<const unsigned char *>(row(base, head, cell / kPackedTokens));
}

void RowPlane::get_blocks(const char *base, int head, std::int64_t cell, int first, int n,
                          block_q4_0 *blocks) const noexcept {
  const auto unpack = kind_ == Kind::keys ? unpack_key_blocks : unpack_value_blocks;
  unpack(tile(base, head, cell), width_ / QK4_0, static_cast<int>(cell % kPackedTokens),
         first / QK4_0, n / QK4_0, blocks);
}

void RowPlane::put_part(char *base, int head, std::int64_t cell, Format from, const void *part,
                        int first, int n) const noexcept {
  const std::size_t count = static_cast<std::size_t>(n);
  if (!packed()) {
    char *to = base + head * head_stride_ + cell * stride_;
    convert_row(from, part, type_, to + row_bytes(type_, static_cast<std::size_t>(first)), count);
    return;
  }
  block_q4_0 blocks[kPart / QK4_0];
  convert_row(from, part, Format::q4_0, blocks, count);
  const auto pack = kind_ == Kind::keys ? pack_key_blocks : pack_value_blocks;
  pack(blocks, first / QK4_0, n / QK4_0, width_ / QK4_0,
       const_cast<unsigned char *>(tile(base, head, cell)), static_cast<int>(cell % kPackedTokens));
}

void RowPlane::put(char *base, int head, std::int64_t cell, Format from,
                   const void *row) const noexcept {
  if (!packed()) {
    put_part(base, head, cell, from, row, 0, width_);
    return;
  }
  for (int i = 0; i < width_; i += kPart) {
    put_part(base, head, cell, from,
             static_cast<const char *>(row) + row_bytes(from, static_cast<std::size_t>(i)), i,
             std::min(kPart, width_ - i));
  }
}

void RowPlane::put_rows(char *base, int head, const std::int32_t *cells, std::int64_t n,
                        Format from, const Rows &rows) const noexcept {
  const auto row = [&rows](std::int64_t i) {
    return static_cast<const char *>(rows.base) +
           rows.stride * (rows.index != nullptr ? rows.index[i] : i);
  };
  if (!packed() || from == Format::q4_0) {
    for (std::int64_t i = 0; i < n; ++i) {
      put(base, head, cells[i], from, row(i));
    }
    return;
  }
  const Kernels &kernels = active_kernels();
  const auto pack =
      (kind_ == Kind::keys ? kernels.pack_keys : kernels.pack_values)[static_cast<int>(from)];
  for (std::int64_t i = 0; i < n;) {
    const std::int32_t number = cells[i] / kPackedTokens;
    const void *tokens[kPackedTokens] = {};
    for (; i < n && cells[i] / kPackedTokens == number; ++i) {
      const void *&token = tokens[cells[i] % kPackedTokens];
      if (token != nullptr) {
        break; // the same cell again: the last one stays
      }
      token = row(i);
    }
    pack(tokens, width_, base + head * head_stride_ + number * stride_);
  }
}

void RowPlane::put_zeros(char *base, int head, std::int64_t cell, Format from) const noexcept {
  alignas(kCacheLine) static constexpr char zeros[kPart * sizeof(float)] = {};
  for (int i = 0; i < width_; i += kPart) {
    put_part(base, head, cell, from, zeros, i, std::min(kPart, width_ - i));
  }
}

void RowPlane::get(const char *base, int head, std::int64_t cell, float *values) const noexcept {
  if (!packed()) {
    convert_row(type_, row(base, head, cell), Format::f32, values,
                static_cast<std::size_t>(width_));
    return;
  }
  block_q4_0 blocks[kPart / QK4_0];
  for (int i = 0; i < width_; i += kPart) {
    const int n = std::min(kPart, width_ - i);
    get_blocks(base, head, cell, i, n, blocks);
    convert_row(Format::q4_0, blocks, Format::f32, values + i, static_cast<std::size_t>(n));
  }
}

void RowPlane::get_stored(const char *base, int head, std::int64_t cell, void *to) const noexcept {
  if (packed()) {
    get_blocks(base, head, cell, 0, width_, static_cast<block_q4_0 *>(to));
    return;
  }
  std::memcpy(to, row(base, head, cell), row_bytes(type_, static_cast<std::size_t>(width_)));
}

void RowPlane::copy(char *base, int head, std::int64_t cell, const RowPlane &from,
                    const char *from_base, std::int64_t from_cell) const noexcept {
  if (!from.packed()) {
    put(base, head, cell, from.type_, from.row(from_base, head, from_cell));
    return;
  }
  block_q4_0 blocks[kPart / QK4_0];
  for (int i = 0; i < width_; i += kPart) {
    const int n = std::min(kPart, width_ - i);
    from.get_blocks(from_base, head, from_cell, i, n, blocks);
    put_part(base, head, cell, Format::q4_0, blocks, i, n);
  }
}

void RowPlane::copy_rows(char *base, int head, const std::int32_t *cells, std::int64_t n,
                         const RowPlane &from, const char *from_base,
                         const std::int32_t *from_cells) const noexcept {
  if (!from.packed()) {
    put_rows(base, head, cells, n, from.type_,
             {from.row(from_base, head, 0), from.stride_, from_cells});
    return;
  }
  for (std::int64_t i = 0; i < n; ++i) {
    copy(base, head, cells[i], from, from_base, from_cells[i]);
  }
}

} // namespace mixedkv
