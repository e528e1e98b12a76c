#include "filled_cache.h"

#include <algorithm>
#include <numeric>
#include <stdexcept>

namespace mixedkv::bench {
namespace {

constexpr std::int64_t kTokensAtOnce = 256;
/// Rows to draw from beyond those of one slot, so that slots are not all alike.
constexpr std::int64_t kOtherTokens = 1024;

std::int64_t most_tokens(const Fill &fill) { return std::max(kTokensAtOnce, fill.slot); }

CacheConfig config_of(const Shape &shape, const Fill &fill) {
  CacheConfig config;
  config.num_kv_heads = shape.num_kv_heads;
  config.head_dim = config.head_dim_v = shape.head_dim;
  config.hot_k_type = config.hot_v_type = fill.hot_type;
  config.n_pad = 1;
  config.n_seq_max = fill.num_seqs;
  config.quantize = std::max(fill.cold, fill.cold_size) > 0;
  config.cold_k_type = config.cold_v_type = fill.cold_type;
  config.fit_scales = fill.fit_scales;
  if (config.quantize) {
    config.hot_size = fill.hot + most_tokens(fill);
    config.cold_size = std::max(fill.cold, fill.cold_size);
    config.group_size = fill.group_size;
    // Half a token above, so that the level rounds down to the very number.
    config.threshold = (static_cast<double>(fill.hot) + 0.5) / static_cast<double>(config.hot_size);
  } else {
    config.hot_size = fill.hot + fill.slot;
  }
  return config;
}

} // namespace

FilledCache::FilledCache(const Shape &shape, const Fill &fill)
    : shape_(shape), cache_(config_of(shape, fill)), most_tokens_(most_tokens(fill)),
      num_rows_(most_tokens_ + kOtherTokens),
      k_(random_rows(Format::f32, num_rows_ * shape.num_kv_heads,
                     static_cast<std::size_t>(shape.head_dim), 1)),
      v_(random_rows(Format::f32, num_rows_ * shape.num_kv_heads,
                     static_cast<std::size_t>(shape.head_dim), 2)),
      owner_begin_(static_cast<std::size_t>(most_tokens_) + 1),
      owners_(static_cast<std::size_t>(most_tokens_), 0), num_seqs_(fill.num_seqs) {
  std::iota(owner_begin_.begin(), owner_begin_.end(), 0);
  for (std::int64_t left = fill.hot + fill.cold; left > 0;) {
    const std::int64_t n = std::min(left, kTokensAtOnce);
    append(n);
    left -= n;
  }
  const CacheStats stats = cache_.stats();
  if (stats.hot_tokens != fill.hot || stats.cold_tokens != fill.cold) {
    throw std::logic_error("the cache did not put tokens where the benchmark wants them");
  }
  if (fill.slot > 0) {
    store_next(fill.slot);
  }
}

void FilledCache::store_next(std::int64_t n) {
  pos_.resize(static_cast<std::size_t>(n));
  for (std::int64_t i = 0; i < n; ++i) {
    pos_[static_cast<std::size_t>(i)] = (next_pos_ + i) / num_seqs_;
    owners_[static_cast<std::size_t>(i)] = (next_pos_ + i) % num_seqs_;
  }
  if (!cache_.find_slot(pos_.data(), {owner_begin_.data(), owners_.data()}, n)) {
    throw std::logic_error("the cache has no room for a benchmark's tokens");
  }
  const std::ptrdiff_t row = shape_.head_dim * static_cast<std::ptrdiff_t>(sizeof(float));
  const auto rows = [&](const Memory &memory) {
    const std::int64_t first = next_pos_ * 7 % kOtherTokens;
    return RowsView{memory.as<char>() + first * row, Format::f32, num_rows_ * row, row};
  };
  cache_.store(0, rows(k_), rows(v_));
  next_pos_ += n;
}

void FilledCache::append(std::int64_t n) {
  store_next(n);
  cache_.commit();
}

} // namespace mixedkv::bench
