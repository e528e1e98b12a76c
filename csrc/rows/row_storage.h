// The rows of a pool of cells, in one allocation: layer by layer, keys then values. How rows lie
// within a layer is RowPlane's to know.
#pragma once

#include "mixedkv/attention.h"
#include "mixedkv/formats.h"
#include "rows/key_centers.h"
#include "rows/row_plane.h"

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <memory>

namespace mixedkv {

/// What the rows of a cell are. Layers are counted among those that are cached.
struct RowShape {
  int num_layers = 0;
  int num_kv_heads = 0;
  int head_dim = 0;
  int head_dim_v = 0;
  Format k_type = Format::f16;
  Format v_type = Format::f16;
  bool center_keys = false; ///< stored less a vector that neighbours share (key_centers.h)
  bool fit_scales = false;  ///< converted by least squared error (convert_row)

  std::size_t k_row_bytes() const { return row_bytes(k_type, static_cast<std::size_t>(head_dim)); }
  std::size_t v_row_bytes() const {
    return row_bytes(v_type, static_cast<std::size_t>(head_dim_v));
  }
  /// K and V together.
  std::int64_t values_per_row() const { return std::int64_t{head_dim} + head_dim_v; }
  /// Of all layers and heads; with a cell's share of centers.
  std::size_t bytes_per_cell() const {
    const std::size_t rows =
        static_cast<std::size_t>(num_kv_heads) * static_cast<std::size_t>(num_layers);
    const std::size_t centers = center_keys ? rows * static_cast<std::size_t>(head_dim) : 0;
    return (k_row_bytes() + v_row_bytes()) * rows + centers * sizeof(f16_t) / kCenterCells;
  }
};

/// One zeroed allocation, aligned to cache lines. Layers, heads and cells are the caller's to
/// check. What writes rows neither allocates nor throws, and may be called for different layers and
/// heads by several threads at once, for different cells of a head only where rows lie one by one
/// (cells_apart).
class RowStorage {
public:
  /// shape.bytes_per_cell() * num_cells fits (the caller saw to that). Throws std::bad_alloc.
  RowStorage(const RowShape &shape, std::int64_t num_cells);

  const RowShape &shape() const { return shape_; }
  /// Whether different cells of a head may be written by several threads at once.
  bool cells_apart() const { return k_.layout() == Layout::rows && v_.layout() == Layout::rows; }
  std::size_t bytes() const { return num_bytes_ + centers_.bytes(); }

  /// A cell that is about to be written lies among cells that hold nothing any more: what their
  /// keys are stored less of is chosen anew. `in_use(cell)` tells.
  template <typename F> void begin_cell(std::int32_t cell, F &&in_use) noexcept {
    if (shape_.center_keys) {
      const std::int64_t first = cell / kCenterCells * kCenterCells;
      const std::int64_t end = std::min(first + kCenterCells, num_cells_);
      for (std::int64_t c = first; c < end; ++c) {
        if (in_use(static_cast<std::int32_t>(c))) {
          return;
        }
      }
      centers_.forget(cell / kCenterCells);
    }
  }

  /// K and V of a layer: key j of the segment is cell first_cell + j, or index[j] where the caller
  /// sets an index and first_cell is 0. index, pos and len are the caller's to set.
  KeySegment segment(int layer, std::int64_t first_cell) const;

  /// Converts n rows (head_dim or head_dim_v values each) to this storage's type: rows' i-th
  /// becomes that of cells[i]. Not for storage that centers keys.
  void put_k(int layer, int head, const std::int32_t *cells, std::int64_t n, Format from,
             const Rows &rows) noexcept;
  void put_v(int layer, int head, const std::int32_t *cells, std::int64_t n, Format from,
             const Rows &rows) noexcept;
  /// Converts one row to f32.
  void get_k(int layer, int head, std::int64_t cell, float *row) const noexcept;
  void get_v(int layer, int head, std::int64_t cell, float *row) const noexcept;
  /// One row in this storage's own type; blocks one after the other. A centered key is less its
  /// center.
  void get_stored_k(int layer, int head, std::int64_t cell, void *row) const noexcept;
  void get_stored_v(int layer, int head, std::int64_t cell, void *row) const noexcept;

  /// Row from_cells[i] of from_layer of another storage, or of this one, becomes row to_cells[i]
  /// of layer, for every head and i < n, converted where types differ. No cell is on both sides.
  void copy_layer(const RowStorage &from, int from_layer, const std::int32_t *from_cells, int layer,
                  const std::int32_t *to_cells, std::int64_t n) noexcept;
  /// The same in every layer.
  void copy_cells(const RowStorage &from, const std::int32_t *from_cells,
                  const std::int32_t *to_cells, std::int64_t n) noexcept;
  /// Rows of a layer become what zeros of type `from` convert to.
  void zero_layer(int layer, Format from_k, Format from_v, const std::int32_t *cells,
                  std::int64_t n) noexcept;

private:
  char *k_base(int layer) const { return data_ + layer * layer_stride_; }
  char *v_base(int layer) const { return k_base(layer) + k_.bytes(); }
  void copy_head(const RowStorage &from, int from_layer, const std::int32_t *from_cells, int layer,
                 const std::int32_t *to_cells, std::int64_t n, int head) noexcept;
  template <typename F>
  void put_centered(int layer, int head, const std::int32_t *cells, std::int64_t n,
                    F &&row) noexcept;

  struct Free {
    void operator()(void *p) const { std::free(p); }
  };

  RowShape shape_;
  std::int64_t num_cells_;
  RowPlane k_;
  RowPlane v_;
  KeyCenters centers_; ///< of nothing where keys are not centered
  std::ptrdiff_t layer_stride_;
  std::size_t num_bytes_;
  std::unique_ptr<void, Free> allocation_;
  char *data_; ///< into allocation_, at a multiple of 64
};

} // namespace mixedkv
