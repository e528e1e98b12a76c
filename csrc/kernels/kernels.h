// The one interface between what depends on the instruction set and what does not: a table of
// function pointers, those of a format by its name. Every kernel is noexcept, allocates nothing,
// needs no alignment beyond that of the element type, reads and writes only what its contract
// names, and adds up in f32.
#pragma once

#include "formats/rows.h"
#include "formats/token_tile.h"
#include "kernels/bf16_kernels.h"
#include "mixedkv/formats.h"

namespace mixedkv {

/// A sum of n terms in one f32 may be off by n / 2 roundings: kernels add up so many keys at a
/// time.
enum : int { kSumKeys = 128 };

/// Rows of one format, n values (or head_dim, head_dim_v) each, whole blocks.
struct RowKernels {
  // --- conversion: rounding is to nearest even where the format has no rule of its own ----------

  /// Plain formats: overflow gives infinity, NaN stays NaN. To bf16, unlike in bf16_kernels.h, the
  /// numbers below the smallest normal one are rounded too.
  /// q4_0: ggml's quantize_row_q4_0_ref, byte for byte: d = max / -8 with max the first value of
  /// largest magnitude, sign kept; q = min(15, trunc(x * id + 8.5)) with id = 1 / d, x * id
  /// rounded to f32 before the sum. Where 1 / d is not finite the block holds d rounded to f16
  /// (a zero) and every q is 8. A block with a NaN or infinity in it gets d = NaN and every
  /// q = 0, so that each of its values reads back as NaN.
  /// q8_0: ggml's quantize_row_q8_0_ref, byte for byte: d = largest magnitude / 127, q = x * id
  /// rounded to f32, then to the nearest integer, halves away from zero. Where 1 / d is not finite
  /// the block holds d rounded to f16 (a zero) and every q is 0. NaN and infinity as in q4_0.
  /// iq4_nl: ggml's quantize_row_iq4_nl_ref, which is what a ggml cache converts with, byte for
  /// byte: x * (1 / (max / -127)), max as in q4_0, takes the nearest level, the upper of two as
  /// near; d is then sum(x * x * level * x) / sum(x * x * level * level), every product and sum
  /// rounded, in the order of the values. A block whose largest magnitude is below 1e-15 gets d = 0
  /// and every q = 8 (ggml leaves these q to what lay in memory). NaN and infinity as in q4_0, also
  /// where x * x is so large that d is NaN.
  /// nl4, nl3: by least squared error among a few scales, in integers: docs/formats.md, bit for
  /// bit.
  void (*from_f32)(const float *x, void *y, std::size_t n) noexcept;
  void (*from_f16)(const f16_t *x, void *y, std::size_t n) noexcept;
  /// By least squared error (FormatInfo::fits); null where the format knows no such choice. q4_0,
  /// iq4_nl: ggml's block, or the one of a scale among a few others that errs less:
  /// docs/formats.md, bit for bit. nl4, nl3: from_f32 and from_f16 themselves.
  void (*fit_f32)(const float *x, void *y, std::size_t n) noexcept;
  void (*fit_f16)(const f16_t *x, void *y, std::size_t n) noexcept;
  void (*to_f32)(const void *x, float *y, std::size_t n) noexcept;
  /// As by to_f32, rounded to f16.
  void (*to_f16)(const void *x, f16_t *y, std::size_t n) noexcept;

  // --- attention: a group of query rows against a run of keys -----------------------------------

  /// scores[r * ld_scores + j] = q_r . k_j for r < num_rows, j < num_keys; q_r = q + r * ld_q.
  /// A key row is unpacked once for the whole group of query rows where registers allow.
  using QkFn = void(const float *q, std::size_t ld_q, int num_rows, const Rows *k, int num_keys,
                    int head_dim, float *scores, std::size_t ld_scores) noexcept;
  QkFn *qk;

  /// acc[r * ld_acc + i] += sum over j, ascending, of p[r * ld_p + j] * v_j[i]; every kSumKeys keys
  /// are added up by themselves, from 0 on, before they are added to acc. All of these: a weight of
  /// 0 times an infinity is NaN, and keeping the two apart is the caller's business.
  using PvFn = void(const float *p, std::size_t ld_p, int num_rows, const Rows *v, int num_keys,
                    int head_dim_v, float *acc, std::size_t ld_acc) noexcept;
  PvFn *pv;

  /// The first num_keys <= kTileTokens rows of k side by side, the rest zeros: kt is
  /// [head_dim][kTileTokens].
  using TransposeFn = void(const Rows *k, int num_keys, int head_dim, float *kt) noexcept;
  TransposeFn *transpose_keys;

  // --- for arithmetic in bf16 (bf16_kernels.h); null where the instruction set has none ---------

  /// The panel of the first num_keys <= 16 rows of k, the rest zeros; (head_dim + 1) / 2 pairs.
  using KeyPanelFn = void(const Rows *k, int num_keys, int head_dim, bf16_t *panel) noexcept;
  KeyPanelFn *key_panel;
  /// num_keys rows of v into the first (num_keys + 1) / 2 pairs of panels that are ld_panel numbers
  /// apart; zeros for an odd last key's partner and beyond head_dim_v.
  using ValuePanelsFn = void(const Rows *v, int num_keys, int head_dim_v, bf16_t *panels,
                             std::size_t ld_panel) noexcept;
  ValuePanelsFn *value_panels;
};

/// Token tiles of one format (formats/token_tile.h); row i of `tiles` is tile i.
struct TileKernels {
  /// Query rows in the form that qk takes: tile_query_floats(head_dim) floats a row.
  void (*prepare_query)(const float *q, std::size_t ld_q, int num_rows, int head_dim,
                        float *prepared) noexcept;
  /// As RowKernels::qk, over all tokens of num_tiles tiles. Query values are rounded to 1 / 16256
  /// of the largest of their block of 32, and what that leaves is added where it may show: |error|
  /// is at most half such a step times |k_i|, summed over i, and about 5e-4 at most where roundings
  /// and codes know nothing of each other (below 1e-4 |q| |k| for rows like those of models). What
  /// a score gets depends on its row and its token alone. A NaN or infinity in a query row makes
  /// its scores not finite.
  void (*qk)(const float *prepared, int num_rows, const Rows *tiles, int num_tiles, int head_dim,
             float *scores, std::size_t ld_scores) noexcept;
  /// As RowKernels::pv, over all tokens of num_tiles tiles, up to 256 of them in one sum; p >= 0
  /// (not -0), and 0 for tokens that a row does not see, whose values never show. For each token
  /// that a row sees, |error| is at most 1.3e-4 of the largest |p * d| that it sees in a run of 16
  /// tiles, and all of them together at most 8e-4 of the run's |p * d|, added up but for the
  /// largest, or 1e-4 of all of them (each times the largest code); products below 1e-30 may count
  /// as nothing.
  RowKernels::PvFn *pv;

  /// A tile's values as f32 rows [kTileTokens, head_dim_v].
  void (*values_to_f32)(const void *tile, int head_dim_v, float *values) noexcept;
  /// A tile's keys side by side, [head_dim][kTileTokens].
  void (*keys_to_f32)(const void *tile, int head_dim, float *kt) noexcept;

  /// rows [kTileTokens]: the row that rows[t] points to is converted (the same bits as by from_f32
  /// or from_f16) and becomes token t of the tile; where rows[t] is null, token t keeps its bits.
  /// rows are no part of the tile.
  using PackFn = void(const void *const *rows, int head_dim, void *tile) noexcept;
  PackFn *pack_keys_f32;
  PackFn *pack_keys_f16;
  PackFn *pack_values_f32;
  PackFn *pack_values_f16;
  /// The same by fit_f32 and fit_f16; null where these are.
  PackFn *fit_keys_f32;
  PackFn *fit_keys_f16;
  PackFn *fit_values_f32;
  PackFn *fit_values_f16;

  /// As the panels of RowKernels, of all tokens of one tile; null where the instruction set has no
  /// arithmetic in bf16.
  void (*key_panel)(const void *tile, int head_dim, bf16_t *panel) noexcept;
  void (*value_panels)(const void *tile, int head_dim_v, bf16_t *panels,
                       std::size_t ld_panel) noexcept;
};

struct Kernels {
  /// The name that users see and may force: "scalar", "avx2", "avx512", "neon", ...
  const char *name;

  RowKernels rows[kNumFormats];          ///< by Format
  const TileKernels *tiles[kNumFormats]; ///< by Format; null: no tiles of it

  const RowKernels &of(Format format) const { return rows[static_cast<int>(format)]; }
  const TileKernels *tiles_of(Format format) const { return tiles[static_cast<int>(format)]; }

  // --- values that are checked ------------------------------------------------------------------

  /// Whether none of n values is NaN or infinite.
  bool (*all_finite_f32)(const float *x, std::size_t n) noexcept;
  bool (*all_finite_f16)(const f16_t *x, std::size_t n) noexcept;
  /// The largest |x_j|, NaN aside; 0 where there is none.
  float (*largest_magnitude)(const float *x, std::size_t n) noexcept;

  // --- keys side by side, for many query rows ---------------------------------------------------

  /// As RowKernels::qk, over num_tiles runs [head_dim][kTileTokens] that follow one another.
  void (*qk_transposed)(const float *q, std::size_t ld_q, int num_rows, const float *kt,
                        int num_tiles, int head_dim, float *scores, std::size_t ld_scores) noexcept;

  // --- rows of scores ------------------------------------------------------------------------

  /// Largest of n >= 1 values; -inf where all are. If any is NaN the result may be anything that
  /// is not above the largest number, or NaN: the NaN itself shows up in exp_sum.
  float (*row_max)(const float *x, std::size_t n) noexcept;
  /// x_j = exp(x_j - m) in place, and returns their sum. m finite; x_j <= m or NaN. Exactly 0 where
  /// x_j - m is below -87.33655, -inf included: what would be below the smallest normal number.
  /// Elsewhere the relative error is below 3e-7.
  float (*exp_sum)(float *x, std::size_t n, float m) noexcept;
  /// x_j = cap * tanh(x_j / cap) in place, cap > 0; -inf gives -cap (masks come after). Relative
  /// error below 1e-6.
  void (*soft_cap)(float *x, std::size_t n, float cap) noexcept;
  /// x_j *= f in place.
  void (*scale)(float *x, std::size_t n, float f) noexcept;
  /// x[r * ld_x + j] += c[r * ld_c] for r < num_rows, j < n.
  void (*add_constants)(const float *c, std::size_t ld_c, int num_rows, float *x, std::size_t ld_x,
                        int n) noexcept;
  /// y_j += f * x_j.
  void (*axpy)(float f, const float *x, float *y, std::size_t n) noexcept;
  /// The normalised Walsh-Hadamard transform of every `block` values, in place; block is a power of
  /// two that divides n. Its own inverse, but for rounding; the same bits on every instruction set.
  void (*hadamard)(float *x, std::size_t n, std::size_t block) noexcept;

  /// Arithmetic in bf16; null where the instruction set has none.
  const Bf16Kernels *bf16;
};

} // namespace mixedkv
