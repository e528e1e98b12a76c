// Cells against a model that is too simple to be wrong: a list of optional tokens.
#include "cache/books/cells.h"
#include "reporting.h"

#include <algorithm>
#include <cstdint>
#include <optional>
#include <random>
#include <set>
#include <string>
#include <vector>

namespace {

using mixedkv::Cells;
using mixedkv::kPendingStamp;

struct Token {
  std::int32_t pos;
  std::uint64_t stamp;
  std::set<int> owners;

  std::vector<int> owner_list() const { return {owners.begin(), owners.end()}; }
};

using Model = std::vector<std::optional<Token>>;

std::vector<std::uint64_t> owner_words(const std::set<int> &owners, std::size_t num_words) {
  std::vector<std::uint64_t> words(num_words, 0);
  for (const int seq : owners) {
    words[static_cast<std::size_t>(seq) / 64] |= std::uint64_t{1} << (seq % 64);
  }
  return words;
}

/// Every question that cells answer, against the model.
bool same(const Cells &cells, const Model &model, std::mt19937 &random) {
  std::int64_t used = 0;
  std::int64_t pending = 0;
  std::int32_t end = 0;
  REQUIRE(cells.size() == static_cast<std::int64_t>(model.size()));
  for (std::int32_t c = 0; c < cells.size(); ++c) {
    const auto &token = model[static_cast<std::size_t>(c)];
    REQUIRE(cells.in_use(c) == token.has_value());
    const std::vector<std::uint64_t> words =
        owner_words(token ? token->owners : std::set<int>{}, cells.words_per_cell());
    REQUIRE(std::equal(words.begin(), words.end(), cells.owners(c)));
    if (!token) {
      REQUIRE(!cells.committed(c) && !cells.pending(c));
      continue;
    }
    ++used;
    end = c + 1;
    const bool is_pending = token->stamp == kPendingStamp;
    pending += is_pending;
    REQUIRE(cells.pos(c) == token->pos && cells.stamp(c) == token->stamp);
    REQUIRE(cells.pending(c) == is_pending && cells.committed(c) == !is_pending);
    REQUIRE(cells.shared(c) == (token->owners.size() > 1));
    for (int seq = 0; seq < cells.n_seq_max(); ++seq) {
      REQUIRE(cells.owned_by(c, seq) == (token->owners.count(seq) > 0));
    }
  }
  REQUIRE(cells.num_used() == used && cells.num_free() == cells.size() - used);
  REQUIRE(cells.num_pending() == pending && cells.num_committed() == used - pending);
  REQUIRE(cells.end() == end);
  std::int64_t counted = 0;
  for (std::int32_t tile = 0; tile < cells.num_tiles(); ++tile) {
    std::int32_t in_tile = 0;
    for (std::int32_t c = cells.first_of(tile); c < cells.end_of(tile); ++c, ++counted) {
      REQUIRE(cells.tile_of(c) == tile);
      in_tile += cells.in_use(c);
    }
    REQUIRE(cells.num_used_in(tile) == in_tile);
    REQUIRE(cells.num_used_in(tile) + cells.num_free_in(tile) ==
            cells.end_of(tile) - cells.first_of(tile));
  }
  REQUIRE(counted == cells.size());

  const int seq = static_cast<int>(random() % static_cast<unsigned>(cells.n_seq_max()));
  const std::int64_t low = random() % 20;
  const std::int64_t high = low + random() % 20;
  const bool with_pending = random() % 2 == 0;
  // No entry more than promised: the sanitizer sees to it.
  std::vector<std::int32_t> listed(static_cast<std::size_t>(used));
  std::vector<std::int32_t> positions(static_cast<std::size_t>(used));
  const std::int64_t n =
      cells.collect(seq, low, high, with_pending, listed.data(), positions.data());
  std::int64_t next = 0;
  for (std::int32_t c = 0; c < cells.size(); ++c) {
    const auto &token = model[static_cast<std::size_t>(c)];
    if (token && token->owners.count(seq) > 0 && token->pos >= low && token->pos <= high &&
        (with_pending || token->stamp != kPendingStamp)) {
      REQUIRE(next < n && listed[static_cast<std::size_t>(next)] == c &&
              positions[static_cast<std::size_t>(next)] == token->pos);
      ++next;
    }
  }
  REQUIRE(next == n);
  return true;
}

std::int32_t lowest_free(const Model &model) {
  return static_cast<std::int32_t>(std::find(model.begin(), model.end(), std::nullopt) -
                                   model.begin());
}

bool random_operations(std::int64_t size, int n_seq_max, unsigned seed, int num_steps) {
  std::mt19937 random(seed);
  const auto below = [&](std::int64_t n) {
    return static_cast<std::int64_t>(random() % static_cast<std::uint64_t>(n));
  };
  const int tile_cells = 1 + static_cast<int>(seed % 5);
  Cells cells(size, n_seq_max, tile_cells);
  Model model(static_cast<std::size_t>(size));
  std::uint64_t next_stamp = 0;
  REQUIRE(same(cells, model, random));

  const auto pick = [&](bool in_use) -> std::int32_t {
    std::vector<std::int32_t> candidates;
    for (std::int32_t c = 0; c < size; ++c) {
      if (model[static_cast<std::size_t>(c)].has_value() == in_use) {
        candidates.push_back(c);
      }
    }
    return candidates.empty() ? -1
                              : candidates[static_cast<std::size_t>(
                                    below(static_cast<std::int64_t>(candidates.size())))];
  };

  for (int step = 0; step < num_steps; ++step) {
    const std::int32_t used_cell = pick(true);
    const std::int32_t free_cell = pick(false);
    const int seq = static_cast<int>(below(n_seq_max));
    const auto at = [&](std::int32_t c) -> std::optional<Token> & {
      return model[static_cast<std::size_t>(c)];
    };
    switch (below(12)) {
    case 0:
    case 1:
    case 2:
    case 3:
      if (free_cell >= 0) {
        const Token token{static_cast<std::int32_t>(below(40)),
                          below(3) == 0 ? kPendingStamp : next_stamp++,
                          {seq}};
        const std::int32_t expected = lowest_free(model);
        REQUIRE(cells.lowest_free() == expected);
        cells.put(expected, token.pos, token.stamp,
                  owner_words(token.owners, cells.words_per_cell()).data());
        at(expected) = token;
      }
      break;
    case 4:
      if (free_cell >= 0 && used_cell >= 0) {
        const std::int32_t expected = lowest_free(model);
        REQUIRE(cells.lowest_free() == expected);
        cells.put_copy(expected, cells, used_cell);
        at(expected) = at(used_cell);
      }
      break;
    case 5:
      if (free_cell >= 0 && used_cell >= 0) {
        cells.put_copy(free_cell, cells, used_cell);
        at(free_cell) = at(used_cell);
      }
      break;
    case 6:
      if (used_cell >= 0) {
        cells.release(used_cell);
        at(used_cell).reset();
      }
      break;
    case 7:
      if (used_cell >= 0) {
        cells.add_owner(used_cell, seq);
        at(used_cell)->owners.insert(seq);
      }
      break;
    case 8:
      if (used_cell >= 0) {
        const std::vector<int> owners = at(used_cell)->owner_list();
        const int owner =
            owners[static_cast<std::size_t>(below(static_cast<std::int64_t>(owners.size())))];
        cells.remove_owner(used_cell, owner);
        at(used_cell)->owners.erase(owner);
        if (at(used_cell)->owners.empty()) {
          at(used_cell).reset();
        }
      }
      break;
    case 9:
      if (used_cell >= 0) {
        std::set<int> owners;
        for (std::int64_t i = below(3); i > 0; --i) {
          owners.insert(static_cast<int>(below(n_seq_max)));
        }
        cells.set_owners(used_cell, owner_words(owners, cells.words_per_cell()).data());
        at(used_cell)->owners = owners;
        if (owners.empty()) {
          at(used_cell).reset();
        }
      }
      break;
    case 10:
      if (used_cell >= 0) {
        const std::int32_t pos = static_cast<std::int32_t>(below(40));
        cells.set_pos(used_cell, pos);
        at(used_cell)->pos = pos;
        const std::uint64_t stamp = next_stamp++;
        cells.set_stamp(used_cell, stamp);
        at(used_cell)->stamp = stamp;
        if (below(4) == 0) {
          cells.set_only_owner(used_cell, seq);
          at(used_cell)->owners = {seq};
        }
      }
      break;
    default:
      if (below(20) == 0) {
        cells.clear();
        model.assign(model.size(), std::nullopt);
      }
      break;
    }
    REQUIRE(same(cells, model, random));
  }
  return true;
}

bool order_by_age() {
  Cells cells(8, 70);
  const auto take = [&cells](std::int32_t pos, std::uint64_t stamp, int owner) {
    const std::int32_t cell = cells.lowest_free();
    cells.put(cell, pos, stamp, owner_words({owner}, cells.words_per_cell()).data());
    return cell;
  };
  const std::int32_t young = take(3, 9, 0);
  const std::int32_t old = take(30, 2, 0);
  const std::int32_t copy = take(7, 2, 0);   // same token, elsewhere
  const std::int32_t other = take(7, 2, 69); // same token and place, another owner
  const std::int32_t twin = take(7, 2, 69);  // nothing but the cell differs
  std::vector<std::int32_t> order{young, old, copy, other, twin};
  std::sort(order.begin(), order.end(),
            [&](std::int32_t a, std::int32_t b) { return cells.older(a, b); });
  REQUIRE((order == std::vector<std::int32_t>{other, twin, copy, old, young}));
  for (const std::int32_t a : order) {
    REQUIRE(!cells.older(a, a));
  }
  return true;
}

bool no_cells() {
  std::mt19937 random(1);
  const Cells cells(0, 2);
  REQUIRE(same(cells, {}, random));
  return true;
}

} // namespace

int main() {
  for (const std::int64_t size : {1, 2, 8, 65}) {
    for (const int n_seq_max : {1, 3, 64, 65, 130}) {
      testing::report(
          "cells_random size=" + std::to_string(size) + " n_seq_max=" + std::to_string(n_seq_max),
          random_operations(size, n_seq_max, 42u + static_cast<unsigned>(n_seq_max), 2000));
    }
  }
  testing::report("cells_order_by_age", order_by_age());
  testing::report("cells_none", no_cells());
  return testing::summary();
}
