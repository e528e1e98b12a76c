#include "cache/books/movable.h"

#include <algorithm>

namespace mixedkv {

std::int64_t Movable::count(const Cells &hot) const {
  if (sink_tokens_ == 0) {
    return hot.num_committed();
  }
  std::int64_t n = 0;
  for (std::int32_t cell = 0; cell < hot.end(); ++cell) {
    n += may_move(hot, cell);
  }
  return n;
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

} // namespace mixedkv
