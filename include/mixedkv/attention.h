// Attention with carried state. Each query row has a state (M, S, acc): the running maximum of
// its scaled logits x, the sum of exp(x - M), and the sum of exp(x - M) * v. A segment of keys
// continues the state; finalize gives acc / S. The accumulator is reset only while M is -inf.
// (Milakov and Gimelshein 2018, arXiv:1805.02867; Dao et al. 2022, arXiv:2205.14135.)
#pragma once

#include "mixedkv/export.h"
#include "mixedkv/formats.h"
#include "mixedkv/row_transform.h"

#include <cstddef>
#include <cstdint>

namespace mixedkv {

/// Queries that share one list of key segments: a batch row, or a sequence's tokens of a ubatch.
/// Strides are in bytes; the values of a row lie side by side. type is f32 or f16.
/// Query i of head h is at data + h * head_stride + row_stride * (index ? index[i] : i),
/// its position is pos ? pos[i] : pos_start + i.
struct QueryView {
  const void *data = nullptr;
  Format type = Format::f32;
  std::ptrdiff_t head_stride = 0;
  std::ptrdiff_t row_stride = 0;
  const std::int32_t *index = nullptr;
  const std::int32_t *pos = nullptr;
  std::int64_t pos_start = 0;
  std::int64_t len = 0;
};

/// A run of keys and values, for all kv heads. Key j of kv head h is at
/// k + h * k_head_stride + k_row_stride * (index ? index[j] : j), likewise v; strides in bytes.
/// Its position is pos ? pos[j] : pos_start + j. Where the layout is tiles, k (v) is that of the
/// tile of cell 0, its stride is a tile's, and key j is in cell index ? index[j] : first_cell + j.
/// The index ascends strictly.
///
/// Or keys lie in pages: key j is number i = j % page_size of page p = pages[j / page_size], at
/// k + h * k_head_stride + p * k_page_stride + k_row_stride * i, likewise v; where the layout is
/// tiles, in tile i / kTileTokens of the page, which holds whole tiles. Pages come in any order,
/// and in several segments, as a page table lists them; what the last one holds beyond len is
/// nobody's.
struct KeySegment {
  const void *k = nullptr;
  const void *v = nullptr;
  Format k_format = Format::f32;
  Format v_format = Format::f32;
  Layout k_layout = Layout::rows;
  Layout v_layout = Layout::rows;
  std::ptrdiff_t k_head_stride = 0;
  std::ptrdiff_t k_row_stride = 0;
  std::ptrdiff_t v_head_stride = 0;
  std::ptrdiff_t v_row_stride = 0;
  const std::int32_t *index = nullptr;
  const std::int32_t *pos = nullptr;
  std::int64_t pos_start = 0;
  std::int64_t first_cell = 0;
  std::int64_t len = 0;
  const std::int32_t *pages = nullptr;
  std::int64_t page_size = 0; ///< keys
  std::ptrdiff_t k_page_stride = 0;
  std::ptrdiff_t v_page_stride = 0;
  /// Not null: keys are stored less a vector that they share with their neighbours, which gives the
  /// logits of all of them one more term. That of the keys of kv head h in cells
  /// [n * kCenterCells, (n + 1) * kCenterCells) is at k_centers + h * k_center_head_stride +
  /// n * head_dim, in f16 (the stride counts values). Key j is in cell index ? index[j] :
  /// first_cell + j, in rows too; never with pages.
  const f16_t *k_centers = nullptr;
  std::ptrdiff_t k_center_head_stride = 0;
};

/// Cells that share a center of keys (KeySegment::k_centers).
enum : int { kCenterCells = 128 };

enum class MaskType : std::uint8_t { none, f32, f16, boolean };

/// Additive (f32, f16) or boolean (one byte, non-zero = attend) mask; entry of head h, query i,
/// key j (counted through all segments) at data + h * head_stride + i * query_stride +
/// j * key_stride, in bytes; a stride may be 0.
struct MaskView {
  MaskType type = MaskType::none;
  const void *data = nullptr;
  std::ptrdiff_t head_stride = 0;
  std::ptrdiff_t query_stride = 0;
  std::ptrdiff_t key_stride = 0;
};

/// Carried state of [num_qo_heads, len] rows, contiguous: ms [rows, 2] (M first), acc
/// [rows, head_dim_v]. ms null: no state is carried in or out.
struct StateView {
  float *ms = nullptr;
  float *acc = nullptr;
};

/// Where the normalised result goes: f32, query i of head h at data + h * head_stride +
/// row_stride * (index ? index[i] : i), strides counted in floats; lse likewise. data null:
/// no result is wanted; lse null: no lse.
struct OutputView {
  float *data = nullptr;
  std::ptrdiff_t head_stride = 0;
  std::ptrdiff_t row_stride = 0;
  float *lse = nullptr;
  std::ptrdiff_t lse_head_stride = 0;
  std::ptrdiff_t lse_row_stride = 0;
  const std::int32_t *index = nullptr;
};

struct AttentionProblem {
  QueryView q;
  const KeySegment *segments = nullptr;
  int num_segments = 0;
  MaskView mask;
  StateView state;
  OutputView out;
};

/// What queries, keys, weights and values are rounded to in products of many query rows. bf16:
/// where the instruction set in use has kernels for it, else f32. Softmax, M, S and acc are f32
/// always.
/// automatic: what auto_compute_type says.
enum class ComputeType : std::uint8_t { f32, bf16, automatic };

/// f32 or bf16, whichever is the faster with the instruction set in use: measured on this machine
/// at the first call, which takes some milliseconds, and kept as long as the process lives; bf16
/// where it takes at least a tenth less time. The environment variable MIXEDKV_COMPUTE_TYPE, "f32"
/// or "bf16", decides beforehand; anything else in it is a std::invalid_argument.
MIXEDKV_API ComputeType auto_compute_type();

/// What all problems of a call share.
struct AttentionParams {
  int num_qo_heads = 1;
  int num_kv_heads = 1; ///< divides num_qo_heads; query head h reads kv head h / (their ratio)
  int head_dim = 0;
  int head_dim_v = 0;
  float sm_scale = 1.0f;
  float logits_soft_cap = 0.0f;   ///< 0: none; else a normal number
  bool causal = false;            ///< key position <= query position
  std::int64_t window_left = -1;  ///< W >= 0: key positions from p - W on; -1: all
  std::int64_t window_right = -1; ///< R >= 0: key positions up to p + R; -1: all
  /// [num_qo_heads]: logits gain slope * (key position - query position), beside a boolean mask
  /// too; with an additive mask, they gain slope * its entry instead.
  const float *alibi_slopes = nullptr;
  const float *sinks = nullptr; ///< [num_qo_heads] logits that enter S at finalize
  int num_threads = 0;          ///< 0: get_num_threads()
  ComputeType compute_type = ComputeType::f32;
  /// What the keys and the values were changed by: queries are changed as keys are, normalised
  /// results back as values were (not states, which stay changed). Null: nothing.
  const RowTransform *key_transform = nullptr;
  const RowTransform *value_transform = nullptr;
  /// How a problem's keys are cut depends on its own shapes, and not on what else is in the call.
  bool cut_alone = false;
};

/// Attends all problems: continues each one's state over its segments in their order, and writes
/// its normalised output where it wants one. How a long run of keys is cut and in which order
/// partial states merge depends on the shapes alone. Throws std::invalid_argument, before anything
/// is computed, where an index does not ascend or pages can't be walked; sizes, pointers and
/// whether rows and pages exist are the caller's to check.
MIXEDKV_API void attend(const AttentionProblem *problems, int num_problems,
                        const AttentionParams &params);

/// out = acc / S, lse = M + ln S of [num_qo_heads, len] rows; rows that saw no key give zeros and
/// -inf. sinks (or null) as above.
MIXEDKV_API void finalize(const StateView &state, int num_qo_heads, std::int64_t len,
                          int head_dim_v, const float *sinks, const OutputView &out);

/// a becomes the state of the union of what a and b saw; rows of b whose M is -inf change nothing.
/// No state has an M of +inf (a logit of +inf makes M NaN): a row that was given one becomes NaN
/// with any row that has seen a key.
MIXEDKV_API void merge(const StateView &a, const StateView &b, std::int64_t num_rows,
                       int head_dim_v);

/// Merges num_states normalised results, out [num_states, num_rows, head_dim_v] and lse
/// [num_states, num_rows], into out_merged [num_rows, head_dim_v] and lse_merged [num_rows].
/// All contiguous; an lse of -inf or +inf (which is how FlashAttention 2 and vLLM write it) marks
/// an empty one, whose result may hold anything.
MIXEDKV_API void merge_states(const float *outs, const float *lses, int num_states,
                              std::int64_t num_rows, int head_dim_v, float *out_merged,
                              float *lse_merged);

} // namespace mixedkv
