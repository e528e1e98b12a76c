#include "cache/books/pending_slot.h"

#include <algorithm>
#include <numeric>

namespace mixedkv {

PendingSlot::PendingSlot(std::int64_t num_tokens_reserved, int num_layers)
    : stored(static_cast<std::size_t>(num_layers)) {
  const std::size_t n = static_cast<std::size_t>(num_tokens_reserved);
  for (auto *v : {&pos, &seq, &by_age, &cells, &hot_tokens, &hot_cells}) {
    v->reserve(n);
  }
  is_cold.reserve(n);
}

void PendingSlot::plan(const std::int64_t *token_pos, const TokenOwners &owners, std::int64_t n,
                       std::int64_t num_cold_tokens, const std::uint8_t *pinned) {
  const std::size_t count = static_cast<std::size_t>(n);
  pos.resize(count);
  seq.resize(count);
  for (std::size_t i = 0; i < count; ++i) {
    pos[i] = static_cast<std::int32_t>(token_pos[i]);
    seq[i] = static_cast<std::int32_t>(
        *std::min_element(owners.ids + owners.begin[i], owners.ids + owners.begin[i + 1]));
  }
  by_age.resize(count);
  std::iota(by_age.begin(), by_age.end(), 0);
  const auto older = [this](std::int32_t a, std::int32_t b) {
    return pos[a] != pos[b] ? pos[a] < pos[b] : a < b;
  };
  if (!std::is_sorted(by_age.begin(), by_age.end(), older)) {
    std::sort(by_age.begin(), by_age.end(), older);
  }
  is_cold.assign(count, 0);
  cold_tokens.clear();
  if (num_cold_tokens > 0) {
    cold_tokens.reserve(static_cast<std::size_t>(num_cold_tokens));
    for (std::size_t i = 0; num_cold() < num_cold_tokens; ++i) {
      if (pinned[by_age[i]] == 0) {
        cold_tokens.push_back(by_age[i]);
        is_cold[by_age[i]] = 1;
      }
    }
    // What will lie in one tile is stored at one time.
    std::sort(cold_tokens.begin(), cold_tokens.end(), [&](std::int32_t a, std::int32_t b) {
      return seq[a] != seq[b] ? seq[a] < seq[b] : older(a, b);
    });
  }
  hot_tokens.clear();
  for (std::int32_t i = 0; i < n; ++i) {
    if (is_cold[i] == 0) {
      hot_tokens.push_back(i);
    }
  }
  cells.resize(count);
  hot_cells.resize(hot_tokens.size());
  cold_cells.resize(cold_tokens.size());
  cold_rows.resize(cold_tokens.size());
  std::iota(cold_rows.begin(), cold_rows.end(), 0);
  std::fill(stored.begin(), stored.end(), 0);
  scratch_layer = -1;
}

void PendingSlot::allocate_scratch(const RowShape &hot) {
  if (num_cold() > 0) {
    RowShape shape = hot;
    shape.num_layers = 1;
    scratch = std::make_unique<RowStorage>(shape, num_cold());
  }
}

void PendingSlot::end() noexcept {
  active = false;
  scratch.reset();
}

std::size_t PendingSlot::bytes() const {
  std::size_t sum = is_cold.capacity() + stored.capacity();
  for (const auto *v : {&pos, &seq, &by_age, &cells, &hot_tokens, &hot_cells, &cold_tokens,
                        &cold_cells, &cold_rows}) {
    sum += v->capacity() * sizeof(std::int32_t);
  }
  return sum;
}

std::size_t PendingSlot::scratch_bytes() const { return scratch ? scratch->bytes() : 0; }

} // namespace mixedkv
