// Keys and values for tests of attend(): in runs of cells that start and end within a tile,
// scattered over many, or in pages. Cells that nobody may see hold NaN, so that whatever leaks
// shows.
#pragma once

#include "checks.h"
#include "kernels/dispatch.h"
#include "mixedkv/attention.h"
#include "rows/row_plane.h"

namespace testing {

using namespace mixedkv;

inline std::size_t size(std::int64_t n) { return static_cast<std::size_t>(n); }

/// The keys (or values) of all heads in a pool of cells.
struct Pool {
  RowPlane plane;
  int heads, width;
  std::int64_t cells;
  std::vector<char> bytes;

  Pool(RowPlane::Kind kind, Format type, int row_width, int num_heads, std::int64_t num_cells)
      : plane(kind, type, row_width, num_heads, num_cells), heads(num_heads), width(row_width),
        cells(num_cells), bytes(plane.bytes()) {}
  void fill(std::int64_t cell, float x) {
    const std::vector<float> row(size(width), x);
    for (int h = 0; h < heads; ++h)
      plane.put(bytes.data(), h, cell, Format::f32, row.data());
  }
  void randomise(Random &random, std::int64_t cell, float magnitude = 1.0f) {
    std::vector<float> row(size(width));
    for (int h = 0; h < heads; ++h) {
      for (float &x : row)
        x = magnitude * normal(random);
      plane.put(bytes.data(), h, cell, Format::f32, row.data());
    }
  }
  std::vector<float> get(int head, std::int64_t cell) const {
    std::vector<float> row(size(width));
    plane.get(bytes.data(), head, cell, row.data());
    return row;
  }
};

/// Keys and values in cells of two pools, and the segment that says so.
struct Source {
  Pool k, v;
  std::vector<std::int32_t> index; ///< cells, ascending; empty: first_cell on
  std::vector<std::int32_t> pos;   ///< or empty: from pos_start on
  std::vector<std::int32_t> pages; ///< or cells lie in pages of page_size
  std::int64_t first_cell = 0, pos_start = 0, len = 0, page_size = 0;

  Source(Format k_type, Format v_type, int head_dim, int head_dim_v, int heads, std::int64_t cells)
      : k(RowPlane::Kind::keys, k_type, head_dim, heads, cells),
        v(RowPlane::Kind::values, v_type, head_dim_v, heads, cells) {
    for (std::int64_t cell = 0; cell < cells; ++cell) {
      k.fill(cell, kNan);
      v.fill(cell, kNan);
    }
  }
  std::int64_t cell(std::int64_t j) const {
    if (!pages.empty())
      return pages[size(j / page_size)] * page_size + j % page_size;
    return index.empty() ? first_cell + j : index[size(j)];
  }
  std::int64_t position(std::int64_t j) const { return pos.empty() ? pos_start + j : pos[size(j)]; }
  void randomise(Random &random) {
    for (std::int64_t j = 0; j < len; ++j) {
      k.randomise(random, cell(j));
      v.randomise(random, cell(j), std::ldexp(1.0f, between(random, -4, 1)));
    }
  }
  KeySegment segment() const {
    const auto base = [&](const Pool &pool) {
      // Rows are found from the first key's on, packed ones from cell 0 on.
      const std::int64_t from =
          pool.plane.layout() == Layout::tiles || !index.empty() ? 0 : first_cell;
      return pool.bytes.data() + from * pool.plane.stride();
    };
    KeySegment s;
    s.k = base(k);
    s.v = base(v);
    s.k_format = k.plane.type();
    s.v_format = v.plane.type();
    s.k_layout = k.plane.layout();
    s.v_layout = v.plane.layout();
    s.k_head_stride = k.plane.head_stride();
    s.v_head_stride = v.plane.head_stride();
    s.k_row_stride = k.plane.stride();
    s.v_row_stride = v.plane.stride();
    s.index = index.empty() ? nullptr : index.data();
    s.pos = pos.empty() ? nullptr : pos.data();
    s.pos_start = pos_start;
    s.first_cell = first_cell;
    s.len = len;
    if (!pages.empty()) {
      const auto page_stride = [&](const Pool &pool) {
        const bool tiles = pool.plane.layout() == Layout::tiles;
        return pool.plane.stride() * (tiles ? page_size / kTileTokens : page_size);
      };
      s.pages = pages.data();
      s.page_size = page_size;
      s.k_page_stride = page_stride(k);
      s.v_page_stride = page_stride(v);
    }
    return s;
  }
};

/// A run of cells from `first` on.
inline Source run_of_cells(Random &random, Format k_type, Format v_type, int dim, int dim_v,
                           int heads, std::int64_t first, std::int64_t len) {
  Source source(k_type, v_type, dim, dim_v, heads, (first + len + 40) / 16 * 16);
  source.first_cell = first;
  source.len = len;
  source.randomise(random);
  return source;
}

/// About one cell in `sparseness`, in stretches of up to `stretch`.
inline Source scattered_cells(Random &random, Format k_type, Format v_type, int dim, int dim_v,
                              int heads, std::int64_t len, int sparseness, int stretch) {
  std::vector<std::int32_t> cells;
  std::int32_t next = between(random, 0, 20);
  while (size(len) > cells.size()) {
    const int n = between(random, 1, stretch);
    for (int i = 0; i < n && size(len) > cells.size(); ++i)
      cells.push_back(next++);
    next += between(random, 0, 2 * (sparseness - 1) * n);
  }
  Source source(k_type, v_type, dim, dim_v, heads, (next + 32) / 16 * 16);
  source.index = cells;
  source.len = len;
  source.randomise(random);
  return source;
}

/// The keys and values of a run of cells, in pages here and there.
inline Source in_pages(Random &random, const Source &run, std::int64_t page_size) {
  const std::int64_t num_pages = (run.len + page_size - 1) / page_size;
  std::vector<std::int32_t> table;
  for (std::int64_t p = 0; p < num_pages + 3; ++p)
    table.push_back(static_cast<std::int32_t>(p));
  std::shuffle(table.begin(), table.end(), random);
  table.resize(size(num_pages));
  const std::int64_t cells = ((num_pages + 3) * page_size + 15) / 16 * 16;
  Source source(run.k.plane.type(), run.v.plane.type(), run.k.width, run.v.width, run.k.heads,
                cells);
  source.pages = table;
  source.page_size = page_size;
  source.pos = run.pos;
  source.pos_start = run.pos_start;
  source.len = run.len;
  const auto copy = [&](const Pool &from, Pool &to) {
    for (std::int64_t j = 0; j < run.len; ++j)
      for (int h = 0; h < from.heads; ++h)
        to.plane.copy(to.bytes.data(), h, source.cell(j), from.plane, from.bytes.data(),
                      run.cell(j));
  };
  copy(run.k, source.k);
  copy(run.v, source.v);
  return source;
}

} // namespace testing
