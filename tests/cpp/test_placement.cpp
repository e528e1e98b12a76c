// Where new tokens go: every choice against the rule as it is written, on cells in any state; and
// what it is for, that moves of several sequences leave no tile shared where there is room.
#include "cache/books/placement.h"
#include "cache/tier.h"
#include "reporting.h"

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <random>
#include <set>
#include <string>
#include <vector>

namespace {

using namespace mixedkv;

using Owners = std::vector<std::uint64_t>;

Owners owners_of(const Cells &cells, std::int32_t cell) {
  return {cells.owners(cell), cells.owners(cell) + cells.words_per_cell()};
}

Owners only(const Cells &cells, int seq) {
  Owners words(cells.words_per_cell(), 0);
  words[static_cast<std::size_t>(seq) / 64] = std::uint64_t{1} << (seq % 64);
  return words;
}

/// The sets of owners that the tokens of a tile have.
std::set<Owners> sets_in(const Cells &cells, std::int32_t tile) {
  std::set<Owners> sets;
  for (std::int32_t cell = cells.first_of(tile); cell < cells.end_of(tile); ++cell) {
    if (cells.in_use(cell)) {
      sets.insert(owners_of(cells, cell));
    }
  }
  return sets;
}

/// The rule, as the declaration has it; mixed tells where there was nothing left but other's tiles.
bool is_right(const Cells &cells, const Owners &owners, std::int32_t found, bool &mixed) {
  REQUIRE(found >= 0 && found < cells.size() && !cells.in_use(found));
  mixed = false;
  for (std::int32_t tile = 0; tile < cells.num_tiles(); ++tile) {
    const std::set<Owners> sets = sets_in(cells, tile);
    if (sets.size() == 1 && *sets.begin() == owners && cells.num_free_in(tile) > 0) {
      REQUIRE(found == cells.lowest_free_in(tile));
      return true;
    }
  }
  for (std::int32_t tile = 0; tile < cells.num_tiles(); ++tile) {
    if (cells.num_used_in(tile) == 0) {
      REQUIRE(found == cells.first_of(tile));
      return true;
    }
  }
  mixed = true;
  return true;
}

bool any_state(std::int64_t size, int tile_cells, int n_seq_max, unsigned seed) {
  std::mt19937 random(seed);
  const auto below = [&](std::int64_t n) {
    return static_cast<std::int64_t>(random() % static_cast<std::uint64_t>(n));
  };
  Cells cells(size, n_seq_max, tile_cells);
  Placement placement(cells);
  const std::size_t bytes = placement.bytes();
  for (int round = 0; round < 200; ++round) {
    for (std::int64_t i = below(size); i > 0; --i) { // holes, new owners
      const std::int32_t cell = static_cast<std::int32_t>(below(size));
      if (cells.in_use(cell)) {
        if (below(2) == 0) {
          cells.release(cell);
        } else if (below(3) == 0) {
          cells.add_owner(cell, static_cast<int>(below(n_seq_max)));
        }
      }
    }
    placement.begin(cells);
    for (std::int64_t n = below(cells.num_free() + 1); n > 0; --n) {
      Owners owners = only(cells, static_cast<int>(below(n_seq_max)));
      if (below(8) == 0) {
        owners[0] |= 1;
      }
      const std::int32_t cell = placement.find(cells, owners.data());
      if (tile_cells == 1) {
        REQUIRE(cell == cells.lowest_free());
      } else {
        bool mixed = false;
        REQUIRE(is_right(cells, owners, cell, mixed));
        if (mixed) {
          // No tile becomes a mixed one while there is room in one that is.
          bool room = false;
          for (std::int32_t tile = 0; tile < cells.num_tiles(); ++tile) {
            room |= sets_in(cells, tile).size() > 1 && cells.num_free_in(tile) > 0;
          }
          REQUIRE(!room || sets_in(cells, cells.tile_of(cell)).size() > 1);
        }
      }
      cells.put(cell, 0, 0, owners.data());
    }
  }
  REQUIRE(placement.bytes() == bytes);
  return true;
}

bool same_state_same_choice() {
  // What is chosen must not depend on what was chosen, and taken back, before.
  std::mt19937 random(5);
  Cells cells(96, 4, 16);
  Placement used(cells);
  for (int i = 0; i < 60; ++i) {
    const Owners owners = only(cells, static_cast<int>(random() % 4));
    used.begin(cells);
    cells.put(used.find(cells, owners.data()), 0, 0, owners.data());
  }
  for (int i = 0; i < 30; ++i) {
    const std::int32_t cell = static_cast<std::int32_t>(random() % 96);
    if (cells.in_use(cell)) {
      cells.release(cell);
    }
  }
  std::vector<std::int32_t> first;
  for (int attempt = 0; attempt < 2; ++attempt) {
    std::vector<std::int32_t> chosen;
    Placement fresh(cells);
    Placement &placement = attempt == 0 ? used : fresh;
    placement.begin(cells);
    for (int i = 0; i < 20; ++i) {
      const Owners owners = only(cells, i * 7 % 4);
      chosen.push_back(placement.find(cells, owners.data()));
      cells.put(chosen.back(), 0, 0, owners.data());
    }
    for (const std::int32_t cell : chosen) {
      cells.release(cell);
    }
    if (attempt == 0) {
      first = chosen;
    }
    REQUIRE(chosen == first);
  }
  return true;
}

RowShape shape(Format type) { return {1, 1, 32, 32, type, type}; }

/// Tokens of four sequences, in turns, move to cold in batches.
bool sequences_are_kept_apart(std::int64_t cold_size, bool enough) {
  Tier hot(shape(Format::f16), 64, 4);
  Tier cold(shape(Format::q4_0), cold_size, 4);
  std::int64_t num_shared = 0;
  std::int32_t next = 0;
  while (cold.cells.num_free() >= 24 && (!enough || cold.cells.num_used() < 192)) {
    std::vector<std::int32_t> from, to(24);
    for (int i = 0; i < 24; ++i, ++next) {
      const Owners owners = only(hot.cells, next % 4);
      hot.placement.begin(hot.cells);
      from.push_back(hot.placement.find(hot.cells, owners.data()));
      hot.cells.put(from.back(), next / 4, static_cast<std::uint64_t>(next), owners.data());
    }
    cold.take_copies(hot, from.data(), 24, to.data());
    for (int i = 0; i < 24; ++i) {
      const std::size_t at = static_cast<std::size_t>(i);
      REQUIRE(owners_of(cold.cells, to[at]) == owners_of(hot.cells, from[at]));
      REQUIRE(cold.cells.pos(to[at]) == hot.cells.pos(from[at]));
    }
    hot.release(from.data(), 24);
  }
  for (std::int32_t tile = 0; tile < cold.cells.num_tiles(); ++tile) {
    num_shared += sets_in(cold.cells, tile).size() > 1;
  }
  if (enough) {
    REQUIRE(cold.cells.num_used() == 192 && num_shared == 0);
  } else {
    REQUIRE(cold.cells.num_free() < 24 && num_shared <= 4);
  }
  return true;
}

} // namespace

int main() {
  unsigned seed = 11;
  for (const std::int64_t size : {1, 16, 40, 160}) {
    for (const int tile_cells : {1, 4, 16}) {
      for (const int n_seq_max : {1, 3, 70}) {
        testing::report("placement_any_state size=" + std::to_string(size) + " tile=" +
                            std::to_string(tile_cells) + " n_seq_max=" + std::to_string(n_seq_max),
                        any_state(size, tile_cells, n_seq_max, ++seed));
      }
    }
  }
  testing::report("placement_same_state_same_choice", same_state_same_choice());
  testing::report("placement_keeps_sequences_apart", sequences_are_kept_apart(256, true));
  testing::report("placement_keeps_sequences_apart_exactly", sequences_are_kept_apart(192, true));
  testing::report("placement_short_of_room", sequences_are_kept_apart(100, false));
  return testing::summary();
}
