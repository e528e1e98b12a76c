#include "cache/tier.h"

namespace mixedkv {

void Tier::take_copies(const Tier &from, const std::int32_t *from_cells, std::int64_t n,
                       std::int32_t *to_cells, const std::uint64_t *owners) noexcept {
  placement.begin(cells);
  for (std::int64_t i = 0; i < n; ++i) {
    const std::uint64_t *of_copy = owners != nullptr ? owners : from.cells.owners(from_cells[i]);
    to_cells[i] = put(from.cells.pos(from_cells[i]), from.cells.stamp(from_cells[i]), of_copy);
  }
  rows.copy_cells(from.rows, from_cells, to_cells, n);
}

std::int32_t Tier::put(std::int32_t pos, std::uint64_t stamp,
                       const std::uint64_t *owners) noexcept {
  const std::int32_t cell = placement.find(cells, owners);
  rows.begin_cell(cell, [this](std::int32_t c) { return cells.in_use(c); });
  cells.put(cell, pos, stamp, owners);
  return cell;
}

void Tier::release(const std::int32_t *released, std::int64_t n) noexcept {
  for (std::int64_t i = 0; i < n; ++i) {
    cells.release(released[i]);
  }
}

} // namespace mixedkv
