#include "cache/books/movable.h"

#include <algorithm>

namespace mixedkv {

Movable::Movable(int sink_tokens, int hot_keep, int n_seq_max, std::int64_t num_cells,
                 std::int64_t num_new)
    : sink_tokens_(sink_tokens), hot_keep_(hot_keep), picked_(static_cast<std::size_t>(num_cells)) {
  new_pinned_.reserve(static_cast<std::size_t>(num_new));
  if (hot_keep > 0) {
    const std::size_t num_seqs = static_cast<std::size_t>(n_seq_max);
    pinned_.resize(picked_.size());
    entries_.reserve(picked_.size() + static_cast<std::size_t>(num_new));
    open_.resize((num_seqs + 63) / 64);
    last_.resize(num_seqs);
    num_newer_.resize(num_seqs);
  }
}

std::int64_t Movable::count(const Cells &hot) const noexcept {
  if (sink_tokens_ == 0 && hot_keep_ == 0) {
    return hot.num_committed();
  }
  std::int64_t n = 0;
  for (std::int32_t cell = 0; cell < hot.end(); ++cell) {
    n += may_move(hot, cell);
  }
  return n;
}

std::int64_t Movable::look(const Cells &hot) noexcept {
  if (hot_keep_ > 0) {
    entries_.clear();
    add_committed(hot);
    pin_newest(hot, nullptr);
  }
  return count(hot);
}

std::int64_t Movable::look(const Cells &hot, const std::int64_t *pos, const TokenOwners &owners,
                           std::int64_t n) {
  new_pinned_.resize(static_cast<std::size_t>(n));
  if (hot_keep_ > 0) {
    entries_.clear();
    entries_.reserve(static_cast<std::size_t>(hot.num_committed() + n));
    add_committed(hot);
    for (std::int64_t i = 0; i < n; ++i) {
      entries_.push_back({static_cast<std::int32_t>(pos[i]), static_cast<std::int32_t>(-1 - i)});
    }
  }
  std::transform(pos, pos + n, new_pinned_.begin(),
                 [this](std::int64_t p) { return std::uint8_t{p < sink_tokens_}; });
  if (hot_keep_ > 0) {
    pin_newest(hot, &owners);
  }
  num_new_pinned_ = n - std::count(new_pinned_.begin(), new_pinned_.end(), 0);
  return count(hot);
}

void Movable::add_committed(const Cells &hot) noexcept {
  for (std::int32_t cell = 0; cell < hot.end(); ++cell) {
    if (hot.committed(cell)) {
      entries_.push_back({hot.pos(cell), cell});
    }
  }
}

void Movable::pin_newest(const Cells &hot, const TokenOwners *owners) noexcept {
  std::sort(entries_.begin(), entries_.end(),
            [](const Entry &a, const Entry &b) { return a.pos > b.pos; });
  std::fill(pinned_.begin(), pinned_.end(), 0);
  std::fill(open_.begin(), open_.end(), ~std::uint64_t{0});
  std::fill(last_.begin(), last_.end(), -1);
  std::fill(num_newer_.begin(), num_newer_.end(), 0);
  for (const Entry &entry : entries_) {
    bool pinned = false;
    if (entry.token < 0) {
      const std::int64_t i = -1 - std::int64_t{entry.token};
      for (std::int64_t j = owners->begin[i]; j < owners->begin[i + 1]; ++j) {
        pinned = newest_of(entry.pos, static_cast<int>(owners->ids[j])) || pinned;
      }
      new_pinned_[static_cast<std::size_t>(i)] |= pinned;
      continue;
    }
    // Most tokens are of sequences whose newest were all met above.
    const std::uint64_t *words = hot.owners(entry.token);
    for (std::size_t w = 0; w < open_.size(); ++w) {
      std::uint64_t left = words[w] & open_[w];
      for (int seq = static_cast<int>(w) * 64; left != 0; left >>= 1, ++seq) {
        pinned = ((left & 1) != 0 && newest_of(entry.pos, seq)) || pinned;
      }
    }
    pinned_[static_cast<std::size_t>(entry.token)] = pinned;
  }
}

bool Movable::newest_of(std::int32_t pos, int seq) noexcept {
  const std::size_t s = static_cast<std::size_t>(seq);
  if (last_[s] != pos) {
    last_[s] = pos;
    if (++num_newer_[s] > hot_keep_) {
      open_[s / 64] &= ~(std::uint64_t{1} << (s % 64));
    }
  }
  return num_newer_[s] <= hot_keep_;
}

const std::int32_t *Movable::pick(const Cells &hot, std::int64_t n) noexcept {
  std::int64_t count = 0;
  for (std::int32_t cell = 0; cell < hot.end(); ++cell) {
    if (may_move(hot, cell)) {
      picked_[static_cast<std::size_t>(count++)] = cell;
    }
  }
  const auto older = [&hot](std::int32_t a, std::int32_t b) { return hot.older(a, b); };
  const auto begin = picked_.begin();
  if (n < count) {
    std::nth_element(begin, begin + n, begin + count, older);
  }
  // What will lie in one tile goes there at one time.
  std::sort(begin, begin + n, [&](std::int32_t a, std::int32_t b) {
    const std::uint64_t *of_a = hot.owners(a);
    const std::uint64_t *of_b = hot.owners(b);
    const auto differ = std::mismatch(of_a, of_a + hot.words_per_cell(), of_b);
    return differ.first != of_a + hot.words_per_cell() ? *differ.first < *differ.second
                                                       : older(a, b);
  });
  return picked_.data();
}

std::size_t Movable::bytes() const {
  return (picked_.capacity() + last_.capacity() + num_newer_.capacity()) * sizeof(std::int32_t) +
         pinned_.capacity() + new_pinned_.capacity() + entries_.capacity() * sizeof(Entry) +
         open_.capacity() * sizeof(std::uint64_t);
}

} // namespace mixedkv
