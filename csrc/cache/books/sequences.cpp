#include "cache/books/sequences.h"

#include "cache/checks.h"
#include "mixedkv/errors.h"

#include <algorithm>
#include <limits>
#include <vector>

namespace mixedkv {
namespace {

constexpr std::int64_t kMaxPos = std::numeric_limits<std::int32_t>::max();

struct Range {
  Range(std::int64_t p0, std::int64_t p1)
      : begin(std::max<std::int64_t>(p0, 0)),
        end(p1 < 0 ? std::numeric_limits<std::int64_t>::max() : p1) {}
  bool contains(std::int64_t pos) const { return pos >= begin && pos < end; }

  std::int64_t begin;
  std::int64_t end;
};

/// fn(tier, cell) for each cell in use in either tier; fn may release the cell.
template <typename F> void for_each_cell(Tiers tiers, F fn) {
  for (Tier *tier : {&tiers.hot, &tiers.cold}) {
    for (std::int32_t cell = 0; cell < tier->cells.end(); ++cell) {
      if (tier->cells.in_use(cell)) {
        fn(*tier, cell);
      }
    }
  }
}

/// What a change of positions does in one tier.
struct Shift {
  std::vector<std::int32_t> dropped; ///< cells that the sequence leaves
  std::vector<std::int32_t> moved;   ///< cells of its own, which get their new position
  std::vector<std::int32_t> shared;  ///< cells with other owners, copied first
  std::vector<std::int32_t> copies;  ///< as long as shared
  std::vector<std::uint64_t> owners; ///< of a copy: the sequence alone
};

/// new_pos(p) is the position that p becomes; a negative one drops the token from the sequence.
template <typename F>
Shift plan_shift(const Tier &tier, const char *tier_name, int seq, const Range &range, F new_pos) {
  const Cells &cells = tier.cells;
  Shift shift;
  std::int64_t num_freed = 0;
  for (std::int32_t cell = 0; cell < cells.end(); ++cell) {
    if (!cells.in_use(cell) || !cells.owned_by(cell, seq) || !range.contains(cells.pos(cell))) {
      continue;
    }
    const std::int64_t pos = new_pos(cells.pos(cell));
    if (pos < 0) {
      shift.dropped.push_back(cell);
      num_freed += !cells.shared(cell);
    } else if (pos != cells.pos(cell)) {
      (cells.shared(cell) ? shift.shared : shift.moved).push_back(cell);
    }
  }
  shift.copies.resize(shift.shared.size());
  shift.owners.resize(cells.words_per_cell());
  shift.owners[static_cast<std::size_t>(seq) / 64] = std::uint64_t{1} << (seq % 64);
  const std::int64_t num_free = cells.num_free() + num_freed;
  if (static_cast<std::int64_t>(shift.shared.size()) > num_free) {
    throw CacheFull("positions of sequence " + std::to_string(seq) + ": " +
                    std::to_string(shift.shared.size()) +
                    " cells are shared with other sequences and must be copied, but the " +
                    tier_name + " tier has " + std::to_string(num_free) + " free of " +
                    std::to_string(cells.size()));
  }
  return shift;
}

template <typename F> void apply_shift(Tier &tier, Shift &shift, int seq, F new_pos) noexcept {
  Cells &cells = tier.cells;
  for (const std::int32_t cell : shift.dropped) {
    cells.remove_owner(cell, seq);
  }
  // The copy goes to the sequence alone; the others keep the cell, and notice nothing.
  tier.take_copies(tier, shift.shared.data(), static_cast<std::int64_t>(shift.shared.size()),
                   shift.copies.data(), shift.owners.data());
  for (const std::int32_t cell : shift.shared) {
    cells.remove_owner(cell, seq);
  }
  for (const auto *changed : {&shift.moved, &shift.copies}) {
    for (const std::int32_t cell : *changed) {
      cells.set_pos(cell, static_cast<std::int32_t>(new_pos(cells.pos(cell))));
    }
  }
}

template <typename F> void shift_positions(Tiers tiers, int seq, const Range &range, F new_pos) {
  Shift hot = plan_shift(tiers.hot, "hot", seq, range, new_pos);
  Shift cold = plan_shift(tiers.cold, "cold", seq, range, new_pos);
  apply_shift(tiers.hot, hot, seq, new_pos);
  apply_shift(tiers.cold, cold, seq, new_pos);
}

/// Calls fn(pos) for each committed token of seq.
template <typename F> void for_each_pos(const Cells &cells, int seq, F fn) {
  for (std::int32_t cell = 0; cell < cells.end(); ++cell) {
    if (cells.committed(cell) && cells.owned_by(cell, seq)) {
      fn(cells.pos(cell));
    }
  }
}

} // namespace

void seq_rm(Tiers tiers, std::int64_t seq, std::int64_t p0, std::int64_t p1) noexcept {
  const Range range(p0, p1);
  for_each_cell(tiers, [&](Tier &tier, std::int32_t cell) {
    if (!range.contains(tier.cells.pos(cell))) {
      return;
    }
    if (seq < 0) {
      tier.cells.release(cell);
    } else if (tier.cells.owned_by(cell, static_cast<int>(seq))) {
      tier.cells.remove_owner(cell, static_cast<int>(seq));
    }
  });
}

void seq_cp(Tiers tiers, int src, int dst, std::int64_t p0, std::int64_t p1) noexcept {
  const Range range(p0, p1);
  for_each_cell(tiers, [&](Tier &tier, std::int32_t cell) {
    if (tier.cells.owned_by(cell, src) && range.contains(tier.cells.pos(cell))) {
      tier.cells.add_owner(cell, dst);
    }
  });
}

void seq_keep(Tiers tiers, int seq) noexcept {
  for_each_cell(tiers, [&](Tier &tier, std::int32_t cell) {
    if (tier.cells.owned_by(cell, seq)) {
      tier.cells.set_only_owner(cell, seq);
    } else {
      tier.cells.release(cell);
    }
  });
}

void seq_add(Tiers tiers, int seq, std::int64_t p0, std::int64_t p1, std::int64_t delta) {
  if (delta == 0) {
    return;
  }
  const Range range(p0, p1);
  std::int64_t largest = -1;
  for (const Cells *cells : {&tiers.hot.cells, &tiers.cold.cells}) {
    for_each_pos(*cells, seq, [&](std::int64_t pos) {
      largest = range.contains(pos) ? std::max(largest, pos) : largest;
    });
  }
  if (largest >= 0 && delta > kMaxPos - largest) {
    refuse("delta",
           "leave position " + std::to_string(largest) + " of sequence " + std::to_string(seq) +
               " at 2^31 - 1 at most",
           delta);
  }
  // A sum that passes -2^63 is as negative as any other.
  const std::int64_t bounded = std::max(delta, -kMaxPos - 1);
  shift_positions(tiers, seq, range, [bounded](std::int64_t pos) { return pos + bounded; });
}

void seq_div(Tiers tiers, int seq, std::int64_t p0, std::int64_t p1, std::int64_t d) {
  if (d == 1) {
    return;
  }
  shift_positions(tiers, seq, Range(p0, p1), [d](std::int64_t pos) { return pos / d; });
}

void seq_gather(Tiers tiers, const std::int64_t *sources, int n) {
  std::vector<std::uint64_t> words(tiers.hot.cells.words_per_cell());
  for_each_cell(tiers, [&](Tier &tier, std::int32_t cell) {
    std::fill(words.begin(), words.end(), 0);
    for (int i = 0; i < n; ++i) {
      const bool owned = tier.cells.owned_by(cell, static_cast<int>(sources[i]));
      words[i / 64] |= std::uint64_t{owned} << (i % 64);
    }
    tier.cells.set_owners(cell, words.data());
  });
}

std::int64_t seq_pos_min(const Cells &hot, const Cells &cold, int seq) noexcept {
  std::int64_t pos = -1;
  for (const Cells *cells : {&hot, &cold}) {
    for_each_pos(*cells, seq, [&](std::int64_t p) { pos = pos < 0 ? p : std::min(pos, p); });
  }
  return pos;
}

std::int64_t seq_pos_max(const Cells &hot, const Cells &cold, int seq) noexcept {
  std::int64_t pos = -1;
  for (const Cells *cells : {&hot, &cold}) {
    for_each_pos(*cells, seq, [&](std::int64_t p) { pos = std::max(pos, p); });
  }
  return pos;
}

} // namespace mixedkv
