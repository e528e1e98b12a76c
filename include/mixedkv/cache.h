// The cache that users see: a hot tier (f16 by default) that takes new tokens, and a cold tier
// (Q4_0 by default) that older ones move to, once each. Plan, then commit: find_slot makes room
// (moving tokens where hot is too full), store and attend work on its tokens layer by layer,
// commit makes it final and lets the trigger move more, restore puts back exactly what was there.
#pragma once

#include "mixedkv/attention.h"
#include "mixedkv/cache_config.h"
#include "mixedkv/export.h"
#include "mixedkv/formats.h"
#include "mixedkv/row_transform.h"

#include <cstdint>
#include <memory>
#include <optional>
#include <vector>

namespace mixedkv {

/// Owners of the tokens of a ubatch: token i is owned by ids[begin[i]] .. ids[begin[i + 1] - 1],
/// one at least.
struct TokenOwners {
  const std::int64_t *begin = nullptr; ///< [n + 1]
  const std::int64_t *ids = nullptr;
};

/// What find_slot planned, and what it did to make room.
struct Slot {
  std::int64_t num_tokens = 0;
  std::int64_t num_hot = 0;   ///< tokens that will lie in hot at commit
  std::int64_t num_cold = 0;  ///< tokens of a long ubatch that go straight on to cold
  std::int64_t num_moved = 0; ///< older tokens moved to cold to make room
};

/// New rows of a layer: token i of kv head h at data + h * head_stride + i * row_stride (bytes),
/// values side by side; of any format whose blocks the row holds whole.
struct RowsView {
  const void *data = nullptr;
  Format type = Format::f32;
  std::ptrdiff_t head_stride = 0;
  std::ptrdiff_t row_stride = 0;
};

/// Where the rows of one tier go, in order of position (ties: older first): pos [n], k and v
/// [num_kv_heads, n, bytes of a row] in the tier's own types, Q4_0 in ggml's block order.
struct StoredRows {
  std::int64_t *pos = nullptr;
  void *k = nullptr;
  void *v = nullptr;
};

/// Likewise what these rows stand for: k [num_kv_heads, n, head_dim], v [num_kv_heads, n,
/// head_dim_v].
struct DequantizedRows {
  std::int64_t *pos = nullptr;
  float *k = nullptr;
  float *v = nullptr;
};

struct CacheStats {
  std::int64_t hot_tokens = 0; ///< cells in use, committed
  std::int64_t cold_tokens = 0;
  std::int64_t hot_size = 0;
  std::int64_t cold_size = 0;
  std::int64_t tokens_seen = 0; ///< tokens ever committed
  std::int64_t moved = 0;       ///< tokens ever moved hot -> cold
  std::int64_t events = 0;      ///< batches of moves
  double move_seconds = 0.0;    ///< spent on moves, mostly quantising
  std::int64_t hot_bytes = 0;   ///< allocated for rows, the whole tier
  std::int64_t cold_bytes = 0;
  /// Allocated for what restore needs: a batch of moves, more while a slot that made more is
  /// pending.
  std::int64_t journal_bytes = 0;
  std::int64_t books_bytes = 0;   ///< cells, indices, plans
  std::int64_t scratch_bytes = 0; ///< of a long ubatch, while it is pending
  std::int64_t bytes_saved = 0;   ///< of tokens now in cold, against f16 rows
};

/// Options of MixedCache::attend. Position rules (causal, window) are the cache's own.
struct AttendOptions {
  float sm_scale = 1.0f;
  float logits_soft_cap = 0.0f;
  std::optional<std::int64_t> window_left; ///< unset: the configuration's
  const float *alibi_slopes = nullptr;     ///< [num_qo_heads]
  const float *sinks = nullptr;            ///< [num_qo_heads]
  int num_threads = 0;
  ComputeType compute_type = ComputeType::f32;
};

/// Not thread safe: one caller at a time (the bindings see to that). Every method either does
/// what it says or throws and changes nothing: std::invalid_argument for bad arguments and for
/// calls out of order, CacheFull where there is no room, std::bad_alloc.
class MIXEDKV_API MixedCache {
public:
  /// Throws std::invalid_argument naming the field and its value.
  /// transforms: what rows are changed by (row_transform.h); none where config.rotate is set, which
  /// brings its own.
  explicit MixedCache(const CacheConfig &config, RowTransforms transforms = {});
  ~MixedCache();
  MixedCache(const MixedCache &) = delete;
  MixedCache &operator=(const MixedCache &) = delete;

  const CacheConfig &config() const;

  // --- a ubatch --------------------------------------------------------------------------------

  /// Room for n >= 1 tokens at pos[i] (0 .. 2^31 - 1), owners as said. nullopt where they don't
  /// fit; nothing changed then.
  std::optional<Slot> find_slot(const std::int64_t *pos, const TokenOwners &owners, std::int64_t n);
  bool has_slot() const;
  std::int64_t slot_tokens() const; ///< tokens of the pending slot, 0 without one
  /// K and V rows of the slot's tokens, in the order that find_slot got them. A finite value that
  /// would not stay finite in the types of both tiers (FormatInfo::overflow) is refused; infinities
  /// and NaN are stored as what they are.
  void store(int layer, const RowsView &k, const RowsView &v);
  /// Queries [num_qo_heads, slot tokens, head_dim], same order, against everything that their
  /// sequences own up to their positions. The layer's rows are stored already; of a slot with
  /// tokens bound for cold (num_cold > 0) it must be the layer stored last. Positions and indices
  /// of q and out are the cache's own: q.index and out.index stay null.
  void attend(int layer, const QueryView &q, int num_qo_heads, const AttendOptions &options,
              const OutputView &out);
  void commit();
  void restore();

  // --- sequences: both tiers as one; half-open ranges [p0, p1), p0 < 0: from 0, p1 < 0: no end ---

  void seq_rm(std::int64_t seq, std::int64_t p0, std::int64_t p1); ///< seq < 0: every sequence
  void seq_cp(std::int64_t src, std::int64_t dst, std::int64_t p0, std::int64_t p1);
  void seq_keep(std::int64_t seq);
  void seq_add(std::int64_t seq, std::int64_t p0, std::int64_t p1, std::int64_t delta);
  void seq_div(std::int64_t seq, std::int64_t p0, std::int64_t p1, std::int64_t d);
  /// Sequence i becomes what sequence sources[i] was, for all i < n at once; others end. For
  /// beam search: shares cells, copies nothing.
  void seq_gather(const std::int64_t *sources, std::int64_t n);
  std::int64_t seq_pos_min(std::int64_t seq) const; ///< -1 when empty
  std::int64_t seq_pos_max(std::int64_t seq) const;
  void clear();

  // --- looking ---------------------------------------------------------------------------------

  std::int64_t size() const;                    ///< committed cells in use in both tiers
  std::int64_t seq_len(std::int64_t seq) const; ///< committed cells that seq owns
  /// Committed tokens of seq in order of position (ties: older first): positions [n], and whether
  /// each lies in cold.
  void positions(std::int64_t seq, std::int64_t *pos, std::uint8_t *in_cold) const;
  /// Dequantised rows in that order, out [num_kv_heads, n, head_dim or head_dim_v] f32.
  void keys(int layer, std::int64_t seq, float *out) const;
  void values(int layer, std::int64_t seq, float *out) const;
  /// What attend reads of seq, bit for bit: its committed tokens, and those of a pending slot,
  /// which are all hot rows here, wherever they will lie (attend reads them as such). With a slot
  /// pending the layer is stored already; of a slot with tokens bound for cold it is the layer
  /// stored last. Refused where keys are centered: such rows say nothing by themselves.
  void export_rows(int layer, std::int64_t seq, const StoredRows &to_hot,
                   const StoredRows &to_cold) const;
  /// The same tokens' rows as what they stand for, of any cache: dequantised, centers added, the
  /// transform undone. attend gives what attention over these gives, but for rounding.
  void export_dequantized(int layer, std::int64_t seq, const DequantizedRows &to_hot,
                          const DequantizedRows &to_cold) const;
  /// How many tokens either gives of each tier.
  void export_len(std::int64_t seq, std::int64_t &num_hot, std::int64_t &num_cold) const;
  CacheStats stats() const;

private:
  struct MIXEDKV_LOCAL Impl;
  std::unique_ptr<Impl> impl_;
};

} // namespace mixedkv
