#include "mixed_cache.h"

#include "../kernels/dispatch.h"
#include "../parallel.h"
#include "checks.h"
#include "config.h"
#include "errors.h"
#include "journal.h"
#include "parallel_rows.h"
#include "pending_slot.h"
#include "sequences.h"
#include "slot_plan.h"
#include "unified_cache.h"
#include "visibility.h"

#include <algorithm>
#include <chrono>
#include <cmath>
#include <limits>
#include <string>

namespace mixedkv {
namespace {

/// Tokens of one head that a worker stores at a time.
constexpr std::int64_t kStoreTokens = 64;

struct Counters {
  std::int64_t tokens_seen = 0;
  std::int64_t moved = 0;
  std::int64_t events = 0;
  double seconds = 0.0;
};

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

void check_tokens(const std::int64_t *pos, const TokenOwners &owners, std::int64_t n,
                  int n_seq_max) {
  check(n >= 1 && n <= std::numeric_limits<std::int32_t>::max(), "pos",
        "have at least 1 and fewer than 2^31 entries", n);
  if (pos == nullptr || owners.begin == nullptr || owners.ids == nullptr) {
    throw std::invalid_argument("pos and seq_id must not be null");
  }
  for (std::int64_t i = 0; i < n; ++i) {
    if (pos[i] < 0 || pos[i] > std::numeric_limits<std::int32_t>::max()) {
      refuse("pos[" + std::to_string(i) + "]", "be from 0 to 2^31 - 1", pos[i]);
    }
    const std::int64_t begin = owners.begin[i];
    const std::int64_t end = owners.begin[i + 1];
    if (begin < 0 || end <= begin) {
      refuse("seq_id[" + std::to_string(i) + "]", "name one sequence at least", end - begin);
    }
    for (std::int64_t j = begin; j < end; ++j) {
      if (owners.ids[j] < 0 || owners.ids[j] >= n_seq_max) {
        refuse("seq_id[" + std::to_string(i) + "]",
               "be a sequence id below n_seq_max (" + std::to_string(n_seq_max) + ")",
               owners.ids[j]);
      }
    }
  }
}

void check_rows(const char *name, const RowsView &rows) {
  check(rows.data != nullptr, name, "not be null", "null");
  check(rows.type == KvType::f32 || rows.type == KvType::f16, name, "be rows of f32 or f16",
        kv_type_name(rows.type));
}

const char *head_of(const RowsView &rows, int head) {
  return static_cast<const char *>(rows.data) + head * rows.head_stride;
}

} // namespace

struct MixedCache::Impl {
  explicit Impl(const CacheConfig &c)
      : config(c), level(trigger_level(c)), layer_numbers(cached_layers(c)),
        hot(hot_shape(c), c.hot_size, c.n_seq_max), cold(cold_shape(c), cold_cells(c), c.n_seq_max),
        journal(hot_shape(c), c.quantize ? c.hot_size : 0),
        slot(std::min<std::int64_t>(c.n_seq_max, c.hot_size), hot_shape(c).num_layers),
        visibility(c.hot_size + cold_cells(c), c.n_seq_max),
        oldest(c.quantize ? static_cast<std::size_t>(c.hot_size) : 0), targets(oldest.size()),
        owner_words(hot.cells.words_per_cell()) {}

  /// The number of a layer among the cached ones.
  int layer_number(int layer) const {
    if (layer < 0 || layer >= config.num_layers) {
      refuse("layer", "be from 0 to " + std::to_string(config.num_layers - 1), layer);
    }
    const int number = layer_numbers[static_cast<std::size_t>(layer)];
    check(number >= 0, "layer", "be one that the layer filter keeps", layer);
    return number;
  }

  void need_slot(const char *method) const {
    if (!slot.active) {
      throw std::invalid_argument(std::string(method) +
                                  ": no slot is pending; find_slot comes first");
    }
  }
  void need_no_slot(const char *method) const {
    if (slot.active) {
      throw std::invalid_argument(std::string(method) + ": a slot of " +
                                  std::to_string(slot.num_tokens()) +
                                  " tokens is pending; commit or restore it first");
    }
  }

  bool pinned(std::int32_t pos) const { return pos < config.sinks; }
  bool movable(std::int32_t cell) const {
    return hot.cells.committed(cell) && !pinned(hot.cells.pos(cell));
  }

  std::int64_t count_movable() const {
    if (config.sinks == 0) {
      return hot.cells.num_committed();
    }
    std::int64_t n = 0;
    for (std::int32_t cell = 0; cell < hot.cells.end(); ++cell) {
      n += movable(cell);
    }
    return n;
  }

  /// Moves the oldest tokens that may move; there are as many, and cold has room.
  void move(const MovePlan &plan, bool keep_for_restore) noexcept {
    if (plan.num_tokens == 0) {
      return;
    }
    std::int64_t n = 0;
    for (std::int32_t cell = 0; cell < hot.cells.end(); ++cell) {
      if (movable(cell)) {
        oldest[static_cast<std::size_t>(n++)] = cell;
      }
    }
    const auto older = [this](std::int32_t a, std::int32_t b) { return hot.cells.older(a, b); };
    const auto begin = oldest.begin();
    if (plan.num_tokens < n) {
      std::nth_element(begin, begin + plan.num_tokens, begin + n, older);
    }
    // What will lie in one tile goes there at one time.
    std::sort(begin, begin + plan.num_tokens, [&](std::int32_t a, std::int32_t b) {
      const std::uint64_t *of_a = hot.cells.owners(a);
      const std::uint64_t *of_b = hot.cells.owners(b);
      const auto differ = std::mismatch(of_a, of_a + hot.cells.words_per_cell(), of_b);
      return differ.first != of_a + hot.cells.words_per_cell() ? *differ.first < *differ.second
                                                               : older(a, b);
    });
    {
      const Stopwatch stopwatch(counters.seconds);
      cold.take_copies(hot, oldest.data(), plan.num_tokens, targets.data());
    }
    if (keep_for_restore) {
      journal.record(hot, oldest.data(), targets.data(), plan.num_tokens);
    }
    hot.release(oldest.data(), plan.num_tokens);
    counters.moved += plan.num_tokens;
    counters.events += plan.num_events;
  }

  /// Puts the slot's tokens into cells, pending.
  void occupy(const TokenOwners &owners) noexcept {
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

  std::int32_t take(UnifiedCache &tier, std::size_t token, const TokenOwners &owners) noexcept {
    std::fill(owner_words.begin(), owner_words.end(), 0);
    for (std::int64_t j = owners.begin[token]; j < owners.begin[token + 1]; ++j) {
      owner_words[static_cast<std::size_t>(owners.ids[j]) / 64] |= std::uint64_t{1}
                                                                   << (owners.ids[j] % 64);
    }
    const std::int32_t cell = tier.placement.find(tier.cells, owner_words.data());
    tier.cells.put(cell, slot.pos[token], kPendingStamp, owner_words.data());
    slot.cells[token] = cell;
    return cell;
  }

  /// What an uncommitted slot changed is gone, but for its cells.
  void drop_slot() noexcept {
    counters = before;
    journal.drop();
    end_slot();
  }

  void end_slot() noexcept {
    visibility.end_slot();
    slot.end();
  }

  Tiers tiers() { return {hot, cold}; }

  /// A committed token of a sequence, and where it lies.
  struct Place {
    std::int32_t pos;
    std::uint64_t stamp;
    bool in_cold;
    std::int32_t cell;
  };

  std::vector<Place> places(std::int64_t seq) const {
    check_seq("seq", seq, config.n_seq_max);
    std::vector<Place> list;
    for (const UnifiedCache *tier : {&cold, &hot}) {
      const Cells &cells = tier->cells;
      for (std::int32_t cell = 0; cell < cells.end(); ++cell) {
        if (cells.committed(cell) && cells.owned_by(cell, static_cast<int>(seq))) {
          list.push_back({cells.pos(cell), cells.stamp(cell), tier == &cold, cell});
        }
      }
    }
    // Stable: copies of one token (same stamp) that share a position come cold first.
    std::stable_sort(list.begin(), list.end(), [](const Place &a, const Place &b) {
      return a.pos != b.pos ? a.pos < b.pos : a.stamp < b.stamp;
    });
    return list;
  }

  /// Dequantised rows of seq's committed tokens, of all heads.
  using GetRow = void (RowStorage::*)(int layer, int head, std::int64_t cell, float *row) const;
  void get_rows(int layer, std::int64_t seq, GetRow get, int width, float *out) const {
    const int number = layer_number(layer);
    const std::vector<Place> list = places(seq);
    for (int head = 0; head < config.num_kv_heads; ++head) {
      for (const Place &place : list) {
        ((place.in_cold ? cold : hot).rows.*get)(number, head, place.cell, out);
        out += width;
      }
    }
  }

  /// Tokens of seq as attend finds them in one place, pending ones too, in order of position; cell
  /// is a row of scratch where that is the place.
  enum class Source : std::uint8_t { cold, hot, scratch };
  struct Stored {
    std::int32_t pos;
    std::uint64_t stamp;
    Source source;
    std::int32_t cell;
  };

  /// Hot ones (hot cells, then scratch) or cold ones.
  std::vector<Stored> stored(std::int64_t seq, bool in_cold) const {
    check_seq("seq", seq, config.n_seq_max);
    const int s = static_cast<int>(seq);
    std::vector<Stored> list;
    const Cells &cells = in_cold ? cold.cells : hot.cells;
    for (std::int32_t cell = 0; cell < cells.end(); ++cell) {
      if (cells.in_use(cell) && cells.owned_by(cell, s) && !(in_cold && cells.pending(cell))) {
        list.push_back(
            {cells.pos(cell), cells.stamp(cell), in_cold ? Source::cold : Source::hot, cell});
      }
    }
    if (!in_cold && slot.active) {
      for (std::size_t i = 0; i < slot.cold_cells.size(); ++i) {
        const std::int32_t cell = slot.cold_cells[i];
        if (cold.cells.owned_by(cell, s)) {
          list.push_back({cold.cells.pos(cell), kPendingStamp, Source::scratch, slot.cold_rows[i]});
        }
      }
    }
    std::stable_sort(list.begin(), list.end(), [](const Stored &a, const Stored &b) {
      return a.pos != b.pos ? a.pos < b.pos : a.stamp < b.stamp;
    });
    return list;
  }

  const CacheConfig config;
  const std::int64_t level;             ///< see trigger_level
  const std::vector<int> layer_numbers; ///< by layer; -1 where it is not cached
  UnifiedCache hot;
  UnifiedCache cold; ///< without cells where quantize is false: nothing can ever move then
  Journal journal;   ///< the moves that the pending slot made
  PendingSlot slot;
  Visibility visibility;
  Counters counters;
  Counters before;                        ///< counters when the pending slot was found
  std::uint64_t next_stamp = 0;           ///< above the stamp of every committed token
  std::vector<std::int32_t> oldest;       ///< [hot_size], scratch of move
  std::vector<std::int32_t> targets;      ///< likewise
  std::vector<std::uint64_t> owner_words; ///< scratch of take
};

MixedCache::MixedCache(const CacheConfig &config) {
  check_config(config);
  // Both may refuse their environment variables, and settle once: not in the midst of a move.
  active_kernels();
  get_num_threads();
  impl_ = std::make_unique<Impl>(config);
}

MixedCache::~MixedCache() = default;

const CacheConfig &MixedCache::config() const { return impl_->config; }

std::optional<Slot> MixedCache::find_slot(const std::int64_t *pos, const TokenOwners &owners,
                                          std::int64_t n) {
  Impl &m = *impl_;
  m.need_no_slot("find_slot");
  check_tokens(pos, owners, n, m.config.n_seq_max);

  Room room;
  room.hot_size = m.hot.cells.size();
  room.hot_used = m.hot.cells.num_used();
  room.cold_free = m.cold.cells.num_free();
  room.level = m.level;
  room.group_size = m.config.group_size;
  std::int64_t num_pinned = 0;
  if (n > m.hot.cells.num_free()) {
    room.movable = m.count_movable();
    num_pinned = std::count_if(pos, pos + n, [&](std::int64_t p) { return p < m.config.sinks; });
  }
  const SlotPlan plan = plan_slot(room, n, num_pinned);
  if (!plan.fits) {
    return std::nullopt;
  }
  m.slot.plan(pos, owners, n, plan.num_cold, m.config.sinks);
  m.visibility.begin_slot(m.slot.pos.data(), m.slot.seq.data(), n);
  m.slot.allocate_scratch(m.hot.rows.shape());

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

bool MixedCache::has_slot() const { return impl_->slot.active; }

std::int64_t MixedCache::slot_tokens() const {
  return impl_->slot.active ? impl_->slot.num_tokens() : 0;
}

void MixedCache::store(int layer, const RowsView &k, const RowsView &v) {
  Impl &m = *impl_;
  m.need_slot("store");
  const int number = m.layer_number(layer);
  check_rows("k", k);
  check_rows("v", v);

  PendingSlot &slot = m.slot;
  const RowShape &shape = m.hot.rows.shape();
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
    const Stopwatch stopwatch(m.counters.seconds);
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
  const PendingSlot &slot = m.slot;
  if (slot.stored[static_cast<std::size_t>(number)] == 0) {
    refuse("layer", "be stored before it is attended", layer);
  }
  if (slot.num_cold() > 0 && slot.scratch_layer != number) {
    refuse("layer",
           "be the one stored last, because these " + std::to_string(slot.num_tokens()) +
               " tokens are more than hot holds",
           layer);
  }
  const RowShape &shape = m.hot.rows.shape();
  check(q.data != nullptr, "q", "not be null", "null");
  check(q.type == KvType::f32 || q.type == KvType::f16, "q", "be f32 or f16", kv_type_name(q.type));
  if (q.len != slot.num_tokens()) {
    refuse("q",
           "have a row for each of the slot's " + std::to_string(slot.num_tokens()) + " tokens",
           q.len);
  }
  if (q.index != nullptr || out.index != nullptr) {
    throw std::invalid_argument("q and out must not be indexed");
  }
  if (num_qo_heads < 1 || num_qo_heads % shape.num_kv_heads != 0) {
    refuse("num_qo_heads",
           "be a positive multiple of num_kv_heads (" + std::to_string(shape.num_kv_heads) + ")",
           num_qo_heads);
  }
  check(out.data != nullptr, "out", "not be null", "null");
  check(std::isfinite(options.sm_scale), "sm_scale", "be finite", options.sm_scale);
  check(std::isfinite(options.logits_soft_cap) && options.logits_soft_cap >= 0.0f,
        "logits_soft_cap", "be 0 (none) or positive and finite", options.logits_soft_cap);
  const std::int64_t window_left = options.window_left.value_or(m.config.window_left);
  check(window_left >= -1, "window_left", "be -1 (none) or at least 0", window_left);

  const KeySources sources{m.cold, m.hot, slot.scratch.get(), slot.cold_cells.data(),
                           slot.num_cold()};
  const std::vector<AttentionProblem> &problems =
      m.visibility.problems(sources, number, window_left, q, out);
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
  mixedkv::attend(problems.data(), static_cast<int>(problems.size()), params);
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
    const std::int64_t limit = std::min(m.count_movable(), m.cold.cells.num_free());
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

void MixedCache::clear() {
  Impl &m = *impl_;
  if (m.slot.active) {
    m.drop_slot();
  }
  m.hot.cells.clear();
  m.cold.cells.clear();
}

std::int64_t MixedCache::size() const {
  return impl_->hot.cells.num_committed() + impl_->cold.cells.num_committed();
}

std::int64_t MixedCache::seq_len(std::int64_t seq) const {
  check_seq("seq", seq, impl_->config.n_seq_max);
  std::int64_t n = 0;
  for (const Cells *cells : {&impl_->hot.cells, &impl_->cold.cells}) {
    for (std::int32_t cell = 0; cell < cells->end(); ++cell) {
      n += cells->committed(cell) && cells->owned_by(cell, static_cast<int>(seq));
    }
  }
  return n;
}

void MixedCache::positions(std::int64_t seq, std::int64_t *pos, std::uint8_t *in_cold) const {
  std::size_t i = 0;
  for (const Impl::Place &place : impl_->places(seq)) {
    if (pos != nullptr) {
      pos[i] = place.pos;
    }
    if (in_cold != nullptr) {
      in_cold[i] = place.in_cold;
    }
    ++i;
  }
}

void MixedCache::keys(int layer, std::int64_t seq, float *out) const {
  impl_->get_rows(layer, seq, &RowStorage::get_k, impl_->config.head_dim, out);
}

void MixedCache::values(int layer, std::int64_t seq, float *out) const {
  impl_->get_rows(layer, seq, &RowStorage::get_v, impl_->config.head_dim_v, out);
}

void MixedCache::export_len(std::int64_t seq, std::int64_t &num_hot, std::int64_t &num_cold) const {
  num_hot = static_cast<std::int64_t>(impl_->stored(seq, false).size());
  num_cold = static_cast<std::int64_t>(impl_->stored(seq, true).size());
}

void MixedCache::export_rows(int layer, std::int64_t seq, const StoredRows &to_hot,
                             const StoredRows &to_cold) const {
  const Impl &m = *impl_;
  const int number = m.layer_number(layer);
  if (m.slot.active) {
    if (m.slot.stored[static_cast<std::size_t>(number)] == 0) {
      refuse("layer", "be stored before its rows are exported", layer);
    }
    if (m.slot.num_cold() > 0 && m.slot.scratch_layer != number) {
      refuse("layer",
             "be the one stored last, because these " + std::to_string(m.slot.num_tokens()) +
                 " tokens are more than hot holds",
             layer);
    }
  }
  for (const bool in_cold : {false, true}) {
    const StoredRows &to = in_cold ? to_cold : to_hot;
    const std::vector<Impl::Stored> list = m.stored(seq, in_cold);
    const RowShape &shape = (in_cold ? m.cold : m.hot).rows.shape();
    char *k = static_cast<char *>(to.k);
    char *v = static_cast<char *>(to.v);
    for (std::size_t i = 0; i < list.size(); ++i) {
      to.pos[i] = list[i].pos;
    }
    for (int head = 0; head < m.config.num_kv_heads; ++head) {
      for (const Impl::Stored &token : list) {
        const bool scratch = token.source == Impl::Source::scratch;
        const RowStorage &rows = scratch ? *m.slot.scratch : (in_cold ? m.cold : m.hot).rows;
        rows.get_stored_k(scratch ? 0 : number, head, token.cell, k);
        rows.get_stored_v(scratch ? 0 : number, head, token.cell, v);
        k += shape.k_row_bytes();
        v += shape.v_row_bytes();
      }
    }
  }
}

CacheStats MixedCache::stats() const {
  const Impl &m = *impl_;
  CacheStats stats;
  stats.hot_tokens = m.hot.cells.num_committed();
  stats.cold_tokens = m.cold.cells.num_committed();
  stats.hot_size = m.hot.cells.size();
  stats.cold_size = m.cold.cells.size();
  stats.tokens_seen = m.counters.tokens_seen;
  stats.moved = m.counters.moved;
  stats.events = m.counters.events;
  stats.seconds = m.counters.seconds;
  stats.hot_bytes = static_cast<std::int64_t>(m.hot.rows.bytes());
  stats.cold_bytes = static_cast<std::int64_t>(m.cold.rows.bytes());
  stats.journal_bytes = static_cast<std::int64_t>(m.journal.bytes());
  stats.books_bytes = static_cast<std::int64_t>(
      m.hot.cells.bytes() + m.hot.placement.bytes() + m.cold.cells.bytes() +
      m.cold.placement.bytes() + m.slot.bytes() + m.visibility.bytes() +
      (m.oldest.capacity() + m.targets.capacity()) * sizeof(std::int32_t) +
      m.owner_words.capacity() * sizeof(std::uint64_t) + m.layer_numbers.capacity() * sizeof(int) +
      sizeof(Impl));
  stats.scratch_bytes = static_cast<std::int64_t>(m.slot.scratch_bytes());
  RowShape f16 = m.cold.rows.shape();
  f16.k_type = KvType::f16;
  f16.v_type = KvType::f16;
  stats.bytes_saved =
      stats.cold_tokens * (static_cast<std::int64_t>(f16.bytes_per_cell()) -
                           static_cast<std::int64_t>(m.cold.rows.shape().bytes_per_cell()));
  return stats;
}

} // namespace mixedkv
