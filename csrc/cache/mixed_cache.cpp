// A ubatch, from find_slot to commit or restore, and the moves that it brings about.
#include "mixedkv/cache.h"

#include "attention/call.h"
#include "cache/arguments.h"
#include "cache/mixed_cache_impl.h"
#include "kernels/dispatch.h"
#include "rows/hadamard.h"
#include "rows/parallel_rows.h"
#include "runtime/parallel.h"

#include <algorithm>
#include <chrono>
#include <memory>

namespace mixedkv {
namespace {

/// Tokens of one head that a worker stores at a time.
constexpr std::int64_t kStoreTokens = 64;

/// Tokens of a sequence that a step of decoding may bring, drafted ones included.
constexpr std::int64_t kStepTokens = 16;

/// Adds the time of its life to a counter.
class Stopwatch {
public:
  explicit Stopwatch(double &seconds) : seconds_(seconds), begin_(Clock::now()) {}
  ~Stopwatch() { seconds_ += std::chrono::duration<double>(Clock::now() - begin_).count(); }
  Stopwatch(const Stopwatch &) = delete;
  Stopwatch &operator=(const Stopwatch &) = delete;

private:
  using Clock = std::chrono::steady_clock;
  double &seconds_;
  Clock::time_point begin_;
};

const char *head_of(const RowsView &rows, int head) {
  return static_cast<const char *>(rows.data) + head * rows.head_stride;
}

} // namespace

MixedCache::MixedCache(const CacheConfig &config, RowTransforms transforms) {
  check_config(config);
  if (config.rotate) {
    if (transforms.keys != nullptr || transforms.values != nullptr) {
      throw std::invalid_argument("transforms must be none where rotate is set");
    }
    transforms.keys = transforms.values = std::make_shared<const Hadamard>();
  }
  // Both may refuse their environment variables, and settle once: not in the midst of a move.
  active_kernels();
  get_num_threads();
  impl_ = std::make_unique<Impl>(config, std::move(transforms));
}

MixedCache::~MixedCache() = default;

void MixedCache::Impl::move(const MovePlan &plan, bool keep_for_restore) noexcept {
  const std::int64_t n = plan.num_tokens;
  if (n == 0) {
    return;
  }
  const std::int32_t *oldest = movable.pick(hot.cells, n);
  {
    const Stopwatch stopwatch(counters.move_seconds);
    cold.take_copies(hot, oldest, n, targets.data());
  }
  if (keep_for_restore) {
    journal.record(hot, oldest, targets.data(), n);
  }
  hot.release(oldest, n);
  counters.moved += n;
  counters.events += plan.num_events;
}

void MixedCache::Impl::occupy(const TokenOwners &owners) noexcept {
  hot.placement.begin(hot.cells);
  cold.placement.begin(cold.cells);
  std::size_t num_hot = 0;
  for (std::size_t i = 0; i < slot.pos.size(); ++i) {
    if (slot.is_cold[i] == 0) {
      slot.hot_cells[num_hot++] = take(hot, i, owners);
    }
  }
  for (std::size_t i = 0; i < slot.cold_tokens.size(); ++i) {
    slot.cold_cells[i] = take(cold, static_cast<std::size_t>(slot.cold_tokens[i]), owners);
  }
}

std::int32_t MixedCache::Impl::take(Tier &tier, std::size_t token,
                                    const TokenOwners &owners) noexcept {
  std::fill(owner_words.begin(), owner_words.end(), 0);
  for (std::int64_t j = owners.begin[token]; j < owners.begin[token + 1]; ++j) {
    owner_words[static_cast<std::size_t>(owners.ids[j]) / 64] |= std::uint64_t{1}
                                                                 << (owners.ids[j] % 64);
  }
  const std::int32_t cell = tier.put(slot.pos[token], kPendingStamp, owner_words.data());
  slot.cells[token] = cell;
  return cell;
}

void MixedCache::Impl::drop_slot() noexcept {
  counters = before;
  journal.drop();
  end_slot();
}

void MixedCache::Impl::end_slot() noexcept {
  // What a prompt takes is not held for good; steps of decoding don't allocate.
  if (slot.num_tokens() > kStepTokens * config.n_seq_max) {
    changed_k.release();
    changed_v.release();
  }
  visibility.end_slot();
  slot.end();
}

SlotPlan MixedCache::Impl::plan_room(const std::int64_t *pos, const TokenOwners &owners,
                                     std::int64_t n) {
  Room room;
  room.hot_size = hot.cells.size();
  room.hot_used = hot.cells.num_used();
  room.cold_free = cold.cells.num_free();
  room.level = level;
  room.group_size = config.group_size;
  const std::int64_t hot_free = hot.cells.num_free();
  if (n <= hot_free) {
    return plan_slot(room, n, 0);
  }
  room.movable = movable.look(hot.cells);
  if (n <= hot_free + std::min(room.movable, room.cold_free)) {
    return plan_slot(room, n, 0);
  }
  // A long ubatch. Its own first queries should find the newest of before in hot, so these stay
  // while they can; where they can't, the ubatch's tokens take their place.
  const std::int64_t displaced = movable.look(hot.cells, pos, owners, n) - room.movable;
  const SlotPlan plan = plan_slot(room, n, movable.num_new_pinned());
  if (displaced == 0) {
    return plan;
  }
  if (plan.fits) {
    movable.look(hot.cells);
    return plan;
  }
  room.movable += displaced;
  return plan_slot(room, n, movable.num_new_pinned());
}

std::optional<Slot> MixedCache::find_slot(const std::int64_t *pos, const TokenOwners &owners,
                                          std::int64_t n) {
  Impl &m = *impl_;
  m.need_no_slot("find_slot");
  check_tokens(pos, owners, n, m.config.n_seq_max);

  const SlotPlan plan = m.plan_room(pos, owners, n);
  if (!plan.fits) {
    return std::nullopt;
  }
  try {
    m.slot.plan(pos, owners, n, plan.num_cold, m.movable.new_pinned());
    m.visibility.begin_slot(m.slot.pos.data(), m.slot.seq.data(), n);
    m.slot.allocate_scratch(m.hot.rows.shape());
    m.journal.reserve(plan.moves.num_tokens);
  } catch (...) {
    m.end_slot();
    throw;
  }

  // Nothing from here on can fail.
  m.before = m.counters;
  m.move(plan.moves, true);
  m.occupy(owners);
  m.slot.active = true;
  Slot slot;
  slot.num_tokens = n;
  slot.num_hot = n - plan.num_cold;
  slot.num_cold = plan.num_cold;
  slot.num_moved = plan.moves.num_tokens;
  return slot;
}

void MixedCache::store(int layer, const RowsView &new_k, const RowsView &new_v) {
  Impl &m = *impl_;
  m.need_slot("store");
  const int number = m.layer_number(layer);
  PendingSlot &slot = m.slot;
  const RowShape &shape = m.hot.rows.shape();
  check_rows("k", new_k, shape.head_dim);
  check_rows("v", new_v, shape.head_dim_v);

  const std::int64_t num_tokens = slot.num_tokens();
  const RowsView k = m.changed_k.apply(m.transforms.keys.get(), new_k, shape.num_kv_heads,
                                       num_tokens, shape.head_dim);
  const RowsView v = m.changed_v.apply(m.transforms.values.get(), new_v, shape.num_kv_heads,
                                       num_tokens, shape.head_dim_v);
  StoredAs as;
  as.layer = layer;
  as.num_heads = shape.num_kv_heads;
  as.num_tokens = num_tokens;
  as.width = shape.head_dim;
  as.hot = shape.k_type;
  as.fit_scales = shape.fit_scales;
  if (m.config.quantize) {
    as.cold = m.config.cold_k_type;
    as.centered = m.cold.rows.shape().center_keys;
  }
  if (m.transforms.keys != nullptr) {
    as.unchanged = &new_k;
  }
  check_magnitudes("k", k, as);
  as.width = shape.head_dim_v;
  as.hot = shape.v_type;
  if (m.config.quantize) {
    as.cold = m.config.cold_v_type;
    as.centered = false;
  }
  as.unchanged = m.transforms.values != nullptr ? &new_v : nullptr;
  check_magnitudes("v", v, as);
  const auto store_tokens = [&](RowStorage &rows, int to_layer,
                                const std::vector<std::int32_t> &tokens,
                                const std::vector<std::int32_t> &cells) {
    const std::int64_t n = static_cast<std::int64_t>(tokens.size());
    const std::int64_t step = rows.cells_apart() ? kStoreTokens : std::max<std::int64_t>(n, 1);
    const std::int64_t blocks = (n + step - 1) / step;
    const std::int64_t values = n * shape.num_kv_heads * shape.values_per_row();
    parallel_rows(blocks * shape.num_kv_heads, values, [&](std::int64_t unit) {
      const int head = static_cast<int>(unit / blocks);
      const std::int64_t begin = unit % blocks * step;
      const std::int64_t end = std::min(begin + step, n);
      const auto rows_of = [&](const RowsView &view) {
        return Rows{head_of(view, head), view.row_stride, tokens.data() + begin};
      };
      rows.put_k(to_layer, head, cells.data() + begin, end - begin, k.type, rows_of(k));
      rows.put_v(to_layer, head, cells.data() + begin, end - begin, v.type, rows_of(v));
    });
  };
  store_tokens(m.hot.rows, number, slot.hot_tokens, slot.hot_cells);
  if (slot.num_cold() > 0) {
    store_tokens(*slot.scratch, 0, slot.cold_tokens, slot.cold_rows);
    slot.scratch_layer = number;
    // From the hot type, so that cold holds the same as if hot had held them first.
    const Stopwatch stopwatch(m.counters.move_seconds);
    m.cold.rows.copy_layer(*slot.scratch, 0, slot.cold_rows.data(), number, slot.cold_cells.data(),
                           slot.num_cold());
  }
  slot.stored[static_cast<std::size_t>(number)] = 1;
}

void MixedCache::attend(int layer, const QueryView &q, int num_qo_heads,
                        const AttendOptions &options, const OutputView &out) {
  Impl &m = *impl_;
  m.need_slot("attend");
  const int number = m.layer_number(layer);
  m.need_stored(layer, number, "be stored before it is attended");
  const RowShape &shape = m.hot.rows.shape();
  check_queries(q, num_qo_heads, out, m.slot.num_tokens(), shape.num_kv_heads);
  const std::int64_t window_left = options.window_left.value_or(m.config.window_left);
  check_options(options, window_left);

  const std::vector<AttentionProblem> &problems =
      m.visibility.problems(m.sources(), number, window_left, q, out);
  AttentionParams params;
  params.num_qo_heads = num_qo_heads;
  params.num_kv_heads = shape.num_kv_heads;
  params.head_dim = shape.head_dim;
  params.head_dim_v = shape.head_dim_v;
  params.sm_scale = options.sm_scale;
  params.logits_soft_cap = options.logits_soft_cap;
  params.causal = true;
  params.window_left = window_left;
  params.alibi_slopes = options.alibi_slopes;
  params.sinks = options.sinks;
  params.num_threads = options.num_threads;
  params.compute_type = options.compute_type;
  params.key_transform = m.transforms.keys.get();
  params.value_transform = m.transforms.values.get();
  // Cells are listed in the order of their numbers.
  attend_unchecked(problems.data(), static_cast<int>(problems.size()), params);
}

void MixedCache::commit() {
  Impl &m = *impl_;
  m.need_slot("commit");
  PendingSlot &slot = m.slot;
  const RowShape &hot = m.hot.rows.shape();
  for (std::size_t layer = 0; layer < slot.stored.size(); ++layer) {
    if (slot.stored[layer] == 0) {
      const int number = static_cast<int>(layer);
      m.hot.rows.zero_layer(number, hot.k_type, hot.v_type, slot.hot_cells.data(),
                            slot.num_tokens() - slot.num_cold());
      m.cold.rows.zero_layer(number, hot.k_type, hot.v_type, slot.cold_cells.data(),
                             slot.num_cold());
    }
  }
  for (const std::int32_t token : slot.by_age) {
    Cells &cells = slot.is_cold[static_cast<std::size_t>(token)] != 0 ? m.cold.cells : m.hot.cells;
    cells.set_stamp(slot.cells[static_cast<std::size_t>(token)], m.next_stamp++);
  }
  const std::int64_t group = m.config.group_size;
  m.counters.tokens_seen += slot.num_tokens();
  m.counters.moved += slot.num_cold();
  m.counters.events += (slot.num_cold() + group - 1) / group;
  m.journal.drop();
  m.end_slot();

  if (m.hot.cells.num_used() > m.level && m.cold.cells.num_free() > 0) {
    const std::int64_t limit = std::min(m.movable.look(m.hot.cells), m.cold.cells.num_free());
    m.move(plan_moves(m.hot.cells.num_used(), m.level, group, limit), false);
  }
}

void MixedCache::restore() {
  Impl &m = *impl_;
  m.need_slot("restore");
  const PendingSlot &slot = m.slot;
  m.hot.release(slot.hot_cells.data(), slot.num_tokens() - slot.num_cold());
  m.cold.release(slot.cold_cells.data(), slot.num_cold());
  m.journal.undo(m.hot, m.cold);
  m.drop_slot();
}

void MixedCache::clear() {
  Impl &m = *impl_;
  if (m.slot.active) {
    m.drop_slot();
  }
  m.hot.cells.clear();
  m.cold.cells.clear();
}

} // namespace mixedkv
