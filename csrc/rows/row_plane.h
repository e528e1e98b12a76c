// The keys or the values of one layer of a pool of cells: [kv head][cell][row], or, where they are
// Q4_0, [kv head][tile][...] packed as attention reads them (packed.h).
#pragma once

#include "mixedkv/formats.h"

#include <cstddef>
#include <cstdint>

namespace mixedkv {

class RowPlane {
public:
  /// Which of the two packed layouts.
  enum class Kind : std::uint8_t { keys, values };

  /// Rows of `width` values.
  RowPlane(Kind kind, Format type, int width, int num_heads, std::int64_t num_cells);

  Format type() const { return type_; }
  bool packed() const { return type_ == Format::q4_0; }
  /// Of all heads, a multiple of a cache line.
  std::size_t bytes() const { return bytes_; }
  std::ptrdiff_t head_stride() const { return head_stride_; }
  /// From a row to the next, or from a tile to the next.
  std::ptrdiff_t stride() const { return stride_; }

  // base: where this plane begins in memory. What writes neither allocates nor throws; different
  // heads may be written by several threads at once (packed cells of one head may not: they share
  // bytes).

  const char *row(const char *base, int head, std::int64_t cell) const {
    return base + head * head_stride_ + cell * stride_;
  }
  /// Converts a row of f32, f16 or Q4_0 blocks to this plane's type.
  void put(char *base, int head, std::int64_t cell, Format from, const void *row) const noexcept;
  /// The same for n rows: rows' i-th becomes cell cells[i]'s. Packed tiles are written a tile at a
  /// time where cells of one tile follow one another in the list.
  void put_rows(char *base, int head, const std::int32_t *cells, std::int64_t n, Format from,
                const Rows &rows) const noexcept;
  /// The row becomes what zeros of type `from` convert to.
  void put_zeros(char *base, int head, std::int64_t cell, Format from) const noexcept;
  /// Converts a row to f32.
  void get(const char *base, int head, std::int64_t cell, float *row) const noexcept;
  /// The row as it is stored; Q4_0 in ggml's block order.
  void get_stored(const char *base, int head, std::int64_t cell, void *row) const noexcept;
  /// The row of another plane's cell (of the same width) becomes this one's, converted where the
  /// types differ.
  void copy(char *base, int head, std::int64_t cell, const RowPlane &from, const char *from_base,
            std::int64_t from_cell) const noexcept;
  /// The same for n cells. No cell of this plane is on both sides.
  void copy_rows(char *base, int head, const std::int32_t *cells, std::int64_t n,
                 const RowPlane &from, const char *from_base,
                 const std::int32_t *from_cells) const noexcept;

private:
  /// n values from value `first` on, a multiple of QK4_0 where Q4_0 takes part.
  void put_part(char *base, int head, std::int64_t cell, Format from, const void *part, int first,
                int n) const noexcept;
  const unsigned char *tile(const char *base, int head, std::int64_t cell) const;
  void get_blocks(const char *base, int head, std::int64_t cell, int first, int n,
                  block_q4_0 *blocks) const noexcept;

  Kind kind_;
  Format type_;
  int width_;
  std::ptrdiff_t stride_;
  std::ptrdiff_t head_stride_;
  std::size_t bytes_;
};

} // namespace mixedkv
