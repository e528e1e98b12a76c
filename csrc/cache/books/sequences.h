// Sequence operations over both tiers as one. Ids are the caller's to check; ranges [p0, p1) are
// half open, p0 < 0: from 0, p1 < 0: no end. No token is pending.
#pragma once

#include "cache/tier.h"

#include <cstdint>

namespace mixedkv {

struct Tiers {
  Tier &hot;
  Tier &cold;
};

/// seq < 0: of every sequence. Never fails, as seq_cp and seq_keep.
void seq_rm(Tiers tiers, std::int64_t seq, std::int64_t p0, std::int64_t p1) noexcept;
void seq_cp(Tiers tiers, int src, int dst, std::int64_t p0, std::int64_t p1) noexcept;
void seq_keep(Tiers tiers, int seq) noexcept;
/// Throws, and then nothing changed: std::invalid_argument where a position would pass 2^31 - 1,
/// CacheFull where a tier has no room for copies of shared cells, std::bad_alloc.
void seq_add(Tiers tiers, int seq, std::int64_t p0, std::int64_t p1, std::int64_t delta);
void seq_div(Tiers tiers, int seq, std::int64_t p0, std::int64_t p1, std::int64_t d);
/// Sequence i becomes what sources[i] was, for all i < n at once; others end. Throws
/// std::bad_alloc, and then nothing changed.
void seq_gather(Tiers tiers, const std::int64_t *sources, int n);

/// Smallest and largest position that seq owns, committed; -1 where it owns none.
std::int64_t seq_pos_min(const Cells &hot, const Cells &cold, int seq) noexcept;
std::int64_t seq_pos_max(const Cells &hot, const Cells &cold, int seq) noexcept;

} // namespace mixedkv
