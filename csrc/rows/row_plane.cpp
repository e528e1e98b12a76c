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
constexpr std::size_t kPartBytes = kPart * sizeof(float);

TileKernels::PackFn *packing(const TileKernels &of, RowPlane::Kind kind, Format from, bool fit) {
  if (kind == RowPlane::Kind::keys) {
    return from == Format::f32 ? (fit ? of.fit_keys_f32 : of.pack_keys_f32)
                               : (fit ? of.fit_keys_f16 : of.pack_keys_f16);
  }
  return from == Format::f32 ? (fit ? of.fit_values_f32 : of.pack_values_f32)
                             : (fit ? of.fit_values_f16 : of.pack_values_f16);
}

} // namespace

RowPlane::RowPlane(Kind kind, Format type, int width, int num_heads, std::int64_t num_cells,
                   bool fit_scales)
    : kind_(kind), type_(type), tile_layout_(tile_layout(type)), width_(width),
      num_blocks_(width / format_info(type).block_values), fit_scales_(fit_scales) {
  const std::size_t n = static_cast<std::size_t>(width);
  stride_ = static_cast<std::ptrdiff_t>(tiled() ? tile_bytes(type, n) : row_bytes(type, n));
  const std::int64_t num_rows = tiled() ? (num_cells + kTileTokens - 1) / kTileTokens : num_cells;
  head_stride_ = stride_ * num_rows;
  bytes_ = (static_cast<std::size_t>(head_stride_) * static_cast<std::size_t>(num_heads) +
            kCacheLine - 1) /
           kCacheLine * kCacheLine;
}

const unsigned char *RowPlane::tile(const char *base, int head, std::int64_t cell) const {
  return reinterpret_cast<const unsigned char *>(row(base, head, cell / kTileTokens));
}

void RowPlane::get_blocks(const char *base, int head, std::int64_t cell, int first, int n,
                          void *blocks) const noexcept {
  const int block = format_info(type_).block_values;
  const auto get = kind_ == Kind::keys ? tile_layout_->get_keys : tile_layout_->get_values;
  get(tile(base, head, cell), num_blocks_, static_cast<int>(cell % kTileTokens), first / block,
      n / block, blocks);
}

void RowPlane::put_part(char *base, int head, std::int64_t cell, Format from, const void *part,
                        int first, int n) const noexcept {
  const std::size_t count = static_cast<std::size_t>(n);
  if (!tiled()) {
    char *to = base + head * head_stride_ + cell * stride_;
    convert_row(from, part, type_, to + row_bytes(type_, static_cast<std::size_t>(first)), count,
                fit_scales_);
    return;
  }
  alignas(kCacheLine) char blocks[kPartBytes];
  convert_row(from, part, type_, blocks, count, fit_scales_);
  const int block = format_info(type_).block_values;
  const auto put = kind_ == Kind::keys ? tile_layout_->put_keys : tile_layout_->put_values;
  put(blocks, first / block, n / block, num_blocks_,
      const_cast<unsigned char *>(tile(base, head, cell)), static_cast<int>(cell % kTileTokens));
}

void RowPlane::put(char *base, int head, std::int64_t cell, Format from,
                   const void *row) const noexcept {
  if (!tiled()) {
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
  if (!tiled() || (from != Format::f32 && from != Format::f16)) {
    for (std::int64_t i = 0; i < n; ++i) {
      put(base, head, cells[i], from, row(i));
    }
    return;
  }
  const TileKernels &kernels = *active_kernels().tiles_of(type_);
  const auto pack = packing(kernels, kind_, from, fit_scales_ && format_info(type_).fits);
  for (std::int64_t i = 0; i < n;) {
    const std::int32_t number = cells[i] / kTileTokens;
    const void *tokens[kTileTokens] = {};
    for (; i < n && cells[i] / kTileTokens == number; ++i) {
      const void *&token = tokens[cells[i] % kTileTokens];
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
  if (!tiled()) {
    convert_row(type_, row(base, head, cell), Format::f32, values,
                static_cast<std::size_t>(width_));
    return;
  }
  alignas(kCacheLine) char blocks[kPartBytes];
  for (int i = 0; i < width_; i += kPart) {
    const int n = std::min(kPart, width_ - i);
    get_blocks(base, head, cell, i, n, blocks);
    convert_row(type_, blocks, Format::f32, values + i, static_cast<std::size_t>(n));
  }
}

void RowPlane::get_stored(const char *base, int head, std::int64_t cell, void *to) const noexcept {
  if (tiled()) {
    get_blocks(base, head, cell, 0, width_, to);
    return;
  }
  std::memcpy(to, row(base, head, cell), row_bytes(type_, static_cast<std::size_t>(width_)));
}

void RowPlane::copy(char *base, int head, std::int64_t cell, const RowPlane &from,
                    const char *from_base, std::int64_t from_cell) const noexcept {
  if (!from.tiled()) {
    put(base, head, cell, from.type_, from.row(from_base, head, from_cell));
    return;
  }
  alignas(kCacheLine) char blocks[kPartBytes];
  for (int i = 0; i < width_; i += kPart) {
    const int n = std::min(kPart, width_ - i);
    from.get_blocks(from_base, head, from_cell, i, n, blocks);
    put_part(base, head, cell, from.type_, blocks, i, n);
  }
}

void RowPlane::copy_rows(char *base, int head, const std::int32_t *cells, std::int64_t n,
                         const RowPlane &from, const char *from_base,
                         const std::int32_t *from_cells) const noexcept {
  if (!from.tiled()) {
    put_rows(base, head, cells, n, from.type_,
             {from.row(from_base, head, 0), from.stride_, from_cells});
    return;
  }
  for (std::int64_t i = 0; i < n; ++i) {
    copy(base, head, cells[i], from, from_base, from_cells[i]);
  }
}

} // namespace mixedkv
