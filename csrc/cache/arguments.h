// What callers may hand to a cache's ubatch. All refusals are std::invalid_argument.
#pragma once

#include "mixedkv/cache.h"

#include <cstdint>

namespace mixedkv {

/// Of find_slot.
void check_tokens(const std::int64_t *pos, const TokenOwners &owners, std::int64_t n,
                  int n_seq_max);

/// Of store.
void check_rows(const char *name, const RowsView &rows);

/// Of attend, for a slot of num_tokens; options as they are, but with the window that holds.
void check_queries(const QueryView &q, int num_qo_heads, const OutputView &out,
                   std::int64_t num_tokens, int num_kv_heads);
void check_options(const AttendOptions &options, std::int64_t window_left);

} // namespace mixedkv
