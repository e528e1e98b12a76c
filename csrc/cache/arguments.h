// What callers may hand to a cache's ubatch. All refusals are std::invalid_argument.
#pragma once

#include "mixedkv/cache.h"

#include <cstdint>
#include <optional>

namespace mixedkv {

/// Of find_slot.
void check_tokens(const std::int64_t *pos, const TokenOwners &owners, std::int64_t n,
                  int n_seq_max);

/// Of store.
void check_rows(const char *name, const RowsView &rows, int width);

/// What the rows of a layer become.
struct StoredAs {
  int layer = 0;
  int num_heads = 0;
  std::int64_t num_tokens = 0;
  int width = 0;
  Format hot = Format::f16;
  std::optional<Format> cold; ///< where there is a cold tier
  bool centered = false;      ///< less a center there, whose magnitude is at most 65504
  bool fit_scales = false;    ///< by least squared error, in both tiers
  /// What the rows were before the cache's transform changed them; null: the same.
  const RowsView *unchanged = nullptr;
};

/// Refuses rows with a finite value that would not stay finite in the type of either tier, or that
/// the cache's transform made infinite. What was infinite or NaN already is let through.
void check_magnitudes(const char *name, const RowsView &rows, const StoredAs &as);

/// Of attend, for a slot of num_tokens; options as they are, but with the window that holds.
void check_queries(const QueryView &q, int num_qo_heads, const OutputView &out,
                   std::int64_t num_tokens, int num_kv_heads);
void check_options(const AttendOptions &options, std::int64_t window_left);

} // namespace mixedkv
