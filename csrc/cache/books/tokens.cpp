#include "cache/books/tokens.h"

#include <algorithm>

namespace mixedkv {
namespace {

void add_tokens(std::vector<Token> &list, const Cells &cells, Source source, int seq,
                bool with_pending) {
  for (std::int32_t cell = 0; cell < cells.end(); ++cell) {
    if (cells.in_use(cell) && cells.owned_by(cell, seq) && (with_pending || !cells.pending(cell))) {
      list.push_back({cells.pos(cell), cells.stamp(cell), source, cell});
    }
  }
}

/// Stable: copies of one token (same stamp) that share a position stay as they were listed.
void sort_tokens(std::vector<Token> &list) {
  std::stable_sort(list.begin(), list.end(), [](const Token &a, const Token &b) {
    return a.pos != b.pos ? a.pos < b.pos : a.stamp < b.stamp;
  });
}

} // namespace

std::vector<Token> committed_tokens(const Tier &hot, const Tier &cold, int seq) {
  std::vector<Token> list;
  add_tokens(list, cold.cells, Source::cold, seq, false);
  add_tokens(list, hot.cells, Source::hot, seq, false);
  sort_tokens(list);
  return list;
}

std::vector<Token> attended_tokens(const KeySources &sources, int seq, bool in_cold) {
  std::vector<Token> list;
  if (in_cold) {
    add_tokens(list, sources.cold.cells, Source::cold, seq, false);
  } else {
    add_tokens(list, sources.hot.cells, Source::hot, seq, true);
    for (std::int64_t row = 0; row < sources.num_scratch; ++row) {
      const Cells &cells = sources.cold.cells;
      const std::int32_t cell = sources.scratch_cells[row];
      if (cells.owned_by(cell, seq)) {
        list.push_back(
            {cells.pos(cell), cells.stamp(cell), Source::scratch, static_cast<std::int32_t>(row)});
      }
    }
  }
  sort_tokens(list);
  return list;
}

} // namespace mixedkv
