// The keys or the values of one layer of a pool of cells: [kv head][cell][row], or, where their
// format has tiles, [kv head][tile][...] as attention reads them (formats/token_tile.h).
#pragma once

#include "formats/rows.h"
#include "formats/tile_layout.h"
#include "mixedkv/formats.h"

#include <cstddef>
#include <cstdint>

namespace mixedkv {

class RowPlane {
public:
  /// Which of a tile's two layouts.
  enum class Kind : std::uint8_t { keys, values };

  /// Rows of `width` values. fit_scales: what is converted is by least squared error (convert_row).
  RowPlane(Kind kind, Format type, int width, int num_heads, std::int64_t num_cells,
           bool fit_scales = false);

  Format type() const { return type_; }
  Layout layout() const { return tile_layout_ != nullptr ? Layout::tiles : Layout::rows; }
  /// Of all heads, a multiple of a cache line.
  std::size_t bytes() const { return bytes_; }
  std::ptrdiff_t head_stride() const { return head_stride_; }
  /// From a row to the next, or from a tile to the next.
  std::ptrdiff_t stride() const { return stride_; }

  // base: where this plane begins in memory. What writes neither allocates nor throws; different
  // heads may be written by several threads at once (cells of one tile may not: they share bytes).

  const char *row(const char *base, int head, std::int64_t cell) const {
    return base + head * head_stride_ + cell * stride_;
  }
  /// Converts a row of any format to this plane's.
  void put(char *base, int head, std::int64_t cell, Format from, const void *row) const noexcept;
  /// The same for n rows: rows' i-th becomes cell cells[i]'s. Tiles are written a tile at a
  /// time where cells of one tile follow one another in the list.
  void put_rows(char *base, int head, const std::int32_t *cells, std::int64_t n, Format from,
                const Rows &rows) const noexcept;
  /// The row becomes what zeros of type `from` convert to.
  void put_zeros(char *base, int head, std::int64_t cell, Format from) const noexcept;
  /// Converts a row to f32.
  void get(const char *base, int head, std::int64_t cell, float *row) const noexcept;
  /// The row as it is stored; its blocks one after the other.
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
  /// n values from value `first` on, whole blocks of both formats.
  void put_part(char *base, int head, std::int64_t cell, Format from, const void *part, int first,
                int n) const noexcept;
  const unsigned char *tile(const char *base, int head, std::int64_t cell) const;
  void get_blocks(const char *base, int head, std::int64_t cell, int first, int n,
                  void *blocks) const noexcept;

  bool tiled() const { return tile_layout_ != nullptr; }

  Kind kind_;
  Format type_;
  const TileLayout *tile_layout_; ///< null: rows
  int width_;
  int num_blocks_; ///< of a row
  std::ptrdiff_t stride_;
  std::ptrdiff_t head_stride_;
  std::size_t bytes_;
  bool fit_scales_;
};

} // namespace mixedkv
