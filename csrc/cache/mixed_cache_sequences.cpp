// Operations on sequences: checks, then sequences.h on both tiers.
#include "cache/mixed_cache_impl.h"

namespace mixedkv {

void MixedCache::seq_rm(std::int64_t seq, std::int64_t p0, std::int64_t p1) {
  Impl &m = *impl_;
  m.need_no_slot("seq_rm");
  if (seq >= 0) {
    check_seq("seq", seq, m.config.n_seq_max);
  }
  mixedkv::seq_rm(m.tiers(), seq, p0, p1);
}

void MixedCache::seq_cp(std::int64_t src, std::int64_t dst, std::int64_t p0, std::int64_t p1) {
  Impl &m = *impl_;
  m.need_no_slot("seq_cp");
  check_seq("src", src, m.config.n_seq_max);
  check_seq("dst", dst, m.config.n_seq_max);
  mixedkv::seq_cp(m.tiers(), static_cast<int>(src), static_cast<int>(dst), p0, p1);
}

void MixedCache::seq_keep(std::int64_t seq) {
  Impl &m = *impl_;
  m.need_no_slot("seq_keep");
  check_seq("seq", seq, m.config.n_seq_max);
  mixedkv::seq_keep(m.tiers(), static_cast<int>(seq));
}

void MixedCache::seq_add(std::int64_t seq, std::int64_t p0, std::int64_t p1, std::int64_t delta) {
  Impl &m = *impl_;
  m.need_no_slot("seq_add");
  check_seq("seq", seq, m.config.n_seq_max);
  mixedkv::seq_add(m.tiers(), static_cast<int>(seq), p0, p1, delta);
}

void MixedCache::seq_div(std::int64_t seq, std::int64_t p0, std::int64_t p1, std::int64_t d) {
  Impl &m = *impl_;
  m.need_no_slot("seq_div");
  check_seq("seq", seq, m.config.n_seq_max);
  check(d >= 1, "d", "be at least 1", d);
  mixedkv::seq_div(m.tiers(), static_cast<int>(seq), p0, p1, d);
}

void MixedCache::seq_gather(const std::int64_t *sources, std::int64_t n) {
  Impl &m = *impl_;
  m.need_no_slot("seq_gather");
  if (n < 0 || n > m.config.n_seq_max) {
    refuse("sources", "have n_seq_max (" + std::to_string(m.config.n_seq_max) + ") entries at most",
           n);
  }
  for (std::int64_t i = 0; i < n; ++i) {
    check_seq(("sources[" + std::to_string(i) + "]").c_str(), sources[i], m.config.n_seq_max);
  }
  mixedkv::seq_gather(m.tiers(), sources, static_cast<int>(n));
}

std::int64_t MixedCache::seq_pos_min(std::int64_t seq) const {
  check_seq("seq", seq, impl_->config.n_seq_max);
  return mixedkv::seq_pos_min(impl_->hot.cells, impl_->cold.cells, static_cast<int>(seq));
}

std::int64_t MixedCache::seq_pos_max(std::int64_t seq) const {
  check_seq("seq", seq, impl_->config.n_seq_max);
  return mixedkv::seq_pos_max(impl_->hot.cells, impl_->cold.cells, static_cast<int>(seq));
}

} // namespace mixedkv
