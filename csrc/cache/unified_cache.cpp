#include "unified_cache.h"

namespace mixedkv {

void UnifiedCache::take_copies(const UnifiedCache &from, const std::int32_t *from_cells,
                               std::int64_t n, std::int32_t *to_cells) noexcept {
  for (std::int64_t i = 0; i < n; ++i) {
    to_cells[i] = cells.take_copy(from.cells, from_cells[i]);
  }
  rows.copy_cells(from.rows, from_cells, to_cells, n);
}

void UnifiedCache::release(const std::int32_t *released, std::int64_t n) noexcept {
  for (std::int64_t i = 0; i < n; ++i) {
    cells.release(released[i]);
  }
}

} // namespace mixedkv
