// MixedCache: an allocation that fails changes nothing, and decoding allocates nothing.
#include "cache_cases.h"
#include "runtime/parallel.h"

#include <cstdlib>
#include <new>

// --- allocations of this thread: counted, and refused on request --------------------------------

namespace {
thread_local std::int64_t num_allocations = 0;
thread_local std::int64_t allocations_left = -1; ///< -1: no end

void *allocate(std::size_t size, std::size_t alignment = 0) {
  ++num_allocations;
  if (allocations_left == 0) {
    throw std::bad_alloc();
  }
  if (allocations_left > 0) {
    --allocations_left;
  }
  void *p = alignment != 0
                ? std::aligned_alloc(alignment, (size + alignment) / alignment * alignment)
                : std::malloc(size != 0 ? size : 1);
  if (p == nullptr) {
    throw std::bad_alloc();
  }
  return p;
}
} // namespace

void *operator new(std::size_t size) { return allocate(size); }
void *operator new[](std::size_t size) { return allocate(size); }
void *operator new(std::size_t size, const std::nothrow_t &) noexcept {
  try {
    return allocate(size);
  } catch (const std::bad_alloc &) {
    return nullptr;
  }
}
// The aligned forms too, which buffers and workers' tiles come from.
void *operator new(std::size_t size, std::align_val_t alignment) {
  return allocate(size, static_cast<std::size_t>(alignment));
}
void *operator new[](std::size_t size, std::align_val_t alignment) {
  return allocate(size, static_cast<std::size_t>(alignment));
}
void operator delete(void *p, std::align_val_t) noexcept { std::free(p); }
void operator delete[](void *p, std::align_val_t) noexcept { std::free(p); }
void operator delete(void *p, std::size_t, std::align_val_t) noexcept { std::free(p); }
void operator delete[](void *p, std::size_t, std::align_val_t) noexcept { std::free(p); }
void operator delete(void *p) noexcept { std::free(p); }
void operator delete[](void *p) noexcept { std::free(p); }
void operator delete(void *p, std::size_t) noexcept { std::free(p); }
void operator delete[](void *p, std::size_t) noexcept { std::free(p); }

namespace {

bool failed_allocations_change_nothing(int hot_keep) {
  CacheConfig config = small_config(16, 64, 8, 8);
  config.n_seq_max = 4;
  config.hot_keep = hot_keep;
  const std::vector<Token> old_tokens = make_tokens(0, 20);
  std::vector<std::int64_t> pos;
  std::vector<std::int64_t> begin{0};
  std::vector<std::int64_t> ids;
  for (const std::int64_t seq : {0, 1, 2, 3}) {
    for (std::int64_t i = 0; i < 8; ++i) {
      pos.push_back(20 + i);
      ids.push_back(seq);
      begin.push_back(static_cast<std::int64_t>(ids.size()));
    }
  }
  const std::int64_t sources[] = {1, 0, 0, 1};
  const std::function<void(MixedCache &)> operations[] = {
      [&](MixedCache &c) {
        c.find_slot(pos.data(), {begin.data(), ids.data()}, 3);
      },
      [&](MixedCache &c) {
        c.find_slot(pos.data(), {begin.data(), ids.data()}, 32);
      },
      [&](MixedCache &c) { c.seq_add(1, -1, -1, 3); },
      [&](MixedCache &c) { c.seq_div(1, -1, -1, 2); },
      [&](MixedCache &c) { c.seq_gather(sources, 4); },
  };
  int num_failures = 0;
  for (const std::function<void(MixedCache &)> &operation : operations) {
    MixedCache cache(config);
    REQUIRE(append(cache, old_tokens));
    cache.seq_cp(0, 1, 4, 11);
    const Seen before = look(cache);
    bool failed = true;
    for (std::int64_t left = 0; failed; ++left) {
      failed = false;
      allocations_left = left;
      try {
        operation(cache);
      } catch (const std::bad_alloc &) {
        failed = true;
      }
      allocations_left = -1;
      if (failed) {
        ++num_failures;
        REQUIRE(!cache.has_slot());
        REQUIRE(same(look(cache), before, true)); // bytes of journal and scratch too
      }
    }
    if (cache.has_slot()) { // commit and restore need no memory at all
      allocations_left = 0;
      cache.restore();
      allocations_left = -1;
      REQUIRE(same(look(cache), before, true));
      operation(cache);
      allocations_left = 0;
      cache.commit();
      allocations_left = -1;
    }
  }
  REQUIRE(num_failures >= 10);
  return true;
}

/// With a threshold of 1 it is find_slot that moves tokens, and only then.
bool decode_allocates_nothing(double threshold, int hot_keep, bool rotate) {
  CacheConfig config = small_config(64, 256, 32, 16);
  config.num_layers = 2;
  config.n_seq_max = 2;
  config.threshold = threshold;
  config.hot_keep = hot_keep;
  config.rotate = rotate;
  MixedCache cache(config);
  set_num_threads(1); // waking workers is not this test's business
  std::vector<float> k(idx(2 * 2 * config.head_dim), 0.5f);
  std::vector<float> v(idx(2 * 2 * config.head_dim_v), 0.5f);
  std::vector<float> q(idx(4 * 2 * config.head_dim), 0.5f);
  std::vector<float> o(idx(4 * 2 * config.head_dim_v));
  const RowsView k_rows{k.data(), Format::f32, 2 * 32 * 4, 32 * 4};
  const RowsView v_rows{v.data(), Format::f32, 2 * 64 * 4, 64 * 4};
  QueryView queries;
  queries.data = q.data();
  queries.head_stride = 2 * 32 * 4;
  queries.row_stride = 32 * 4;
  queries.len = 2;
  OutputView out;
  out.data = o.data();
  out.head_stride = 2 * 64;
  out.row_stride = 64;
  const std::int64_t begin[] = {0, 1, 2};
  const std::int64_t ids[] = {0, 1};
  std::int64_t after_first = 0;
  std::int64_t num_moved = 0;
  const auto journal = cache.stats().journal_bytes;
  std::int64_t books = cache.stats().books_bytes;
  for (std::int64_t step = 0; step < 150; ++step) {
    const std::int64_t pos[] = {step, step};
    const std::optional<Slot> slot = cache.find_slot(pos, {begin, ids}, 2);
    if (!slot) {
      return false;
    }
    num_moved += slot->num_moved;
    REQUIRE(cache.stats().journal_bytes == journal);
    for (int layer = 0; layer < 2; ++layer) {
      cache.store(layer, k_rows, v_rows);
      cache.attend(layer, queries, 4, {}, out);
    }
    if (step % 3 == 2) {
      cache.restore();
      REQUIRE(cache.find_slot(pos, {begin, ids}, 2).has_value());
    }
    cache.commit();
    if (step == 140) { // the workspaces of attention and of rotating have their sizes by now
      after_first = num_allocations;
      books = rotate ? cache.stats().books_bytes : books;
    }
  }
  const bool none = num_allocations == after_first;
  set_num_threads(2);
  REQUIRE(none);
  REQUIRE(cache.stats().books_bytes == books);
  REQUIRE((num_moved > 0) == (threshold == 1.0));
  REQUIRE(cache.stats().cold_tokens > 0);
  return true;
}

} // namespace

int main() {
  set_num_threads(2);
  for (const int hot_keep : {0, 2}) {
    testing::report("cache_failed_allocations_change_nothing hot_keep=" + std::to_string(hot_keep),
                    failed_allocations_change_nothing(hot_keep));
  }
  for (const double threshold : {0.8, 1.0}) {
    for (const int hot_keep : {0, 10}) {
      for (const bool rotate : {false, true}) {
        testing::report("cache_decode_allocates_nothing threshold=" + std::to_string(threshold) +
                            " hot_keep=" + std::to_string(hot_keep) +
                            " rotate=" + std::to_string(rotate),
                        decode_allocates_nothing(threshold, hot_keep, rotate));
      }
    }
  }
  return testing::summary();
}
