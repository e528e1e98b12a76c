// The one interface between what depends on the instruction set and what does not: a table of
// function pointers. Every kernel is noexcept, allocates nothing, needs no alignment beyond that
// of the element type, reads and writes only what its contract names, and adds up in f32.
#pragma once

#include "kernels/bf16_kernels.h"
#include "mixedkv/formats.h"

namespace mixedkv {

struct Kernels {
  /// The name that users see and may force: "scalar", "avx2", "avx512", "neon", ...
  const char *name;

  // --- rows: n values each; where Q4_0 takes part, n is a multiple of QK4_0 ------------------

  /// Round to nearest even; overflow gives infinity, NaN stays NaN.
  void (*f32_to_f16)(const float *x, f16_t *y, std::size_t n) noexcept;
  void (*f16_to_f32)(const f16_t *x, float *y, std::size_t n) noexcept;

  /// ggml's quantize_row_q4_0_ref, byte for byte: d = max / -8 with max the first value of
  /// largest magnitude, sign kept; q = min(15, trunc(x * id + 8.5)) with id = 1 / d, x * id
  /// rounded to f32 before the sum. Where 1 / d is not finite the block holds d rounded to f16
  /// (a zero) and every q is 8. A block with a NaN or infinity in it gets d = NaN and every
  /// q = 0, so that each of its values reads back as NaN.
  void (*quantize_row_q4_0_f32)(const float *x, block_q4_0 *y, std::size_t n) noexcept;
  void (*quantize_row_q4_0_f16)(const f16_t *x, block_q4_0 *y, std::size_t n) noexcept;
  void (*dequantize_row_q4_0_f32)(const block_q4_0 *x, float *y, std::size_t n) noexcept;
  /// (q - 8) * d in f32, rounded to f16.
  void (*dequantize_row_q4_0_f16)(const block_q4_0 *x, f16_t *y, std::size_t n) noexcept;

  /// Whether none of n values is NaN or infinite.
  bool (*all_finite_f32)(const float *x, std::size_t n) noexcept;
  bool (*all_finite_f16)(const f16_t *x, std::size_t n) noexcept;

  // --- attention: a group of query rows against a run of keys --------------------------------

  /// scores[r * ld_scores + j] = q_r . k_j for r < num_rows, j < num_keys; q_r = q + r * ld_q.
  /// One function a key type, indexed by Format. head_dim >= 1 (q4_0: a multiple of QK4_0).
  /// A key row is unpacked once for the whole group of query rows where registers allow.
  using QkFn = void(const float *q, std::size_t ld_q, int num_rows, const Rows *k, int num_keys,
                    int head_dim, float *scores, std::size_t ld_scores) noexcept;
  QkFn *qk[kNumKvTypes];

  /// acc[r * ld_acc + i] += sum over j, ascending, of p[r * ld_p + j] * v_j[i].
  using PvFn = void(const float *p, std::size_t ld_p, int num_rows, const Rows *v, int num_keys,
                    int head_dim_v, float *acc, std::size_t ld_acc) noexcept;
  PvFn *pv[kNumKvTypes];

  // --- packed Q4_0 (packed.h): tiles of kPackedTokens tokens, row i of `tiles` is tile i --------

  /// Query rows in the form that qk_packed takes: packed_query_floats(head_dim) floats a row.
  void (*prepare_packed_query)(const float *q, std::size_t ld_q, int num_rows, int head_dim,
                               float *prepared) noexcept;
  /// As qk, over all tokens of num_tiles tiles. Query values are rounded to 1 / 16256 of the
  /// largest of their block of QK4_0: |error| is below 1e-4 |q| |k| for rows like those of models,
  /// and at most half such a step times |k_i|, summed over i. A NaN or infinity in a query row
  /// makes its scores not finite.
  void (*qk_packed)(const float *prepared, int num_rows, const Rows *tiles, int num_tiles,
                    int head_dim, float *scores, std::size_t ld_scores) noexcept;
  /// As pv, over all tokens of num_tiles tiles; p >= 0, and 0 for tokens that a row does not see,
  /// whose values never show. For each token that a row sees, |error| is at most 1.3e-4 of the
  /// largest |p * d| that it sees in a run of 16 tiles; products below 1e-30 may count as nothing.
  void (*pv_packed)(const float *p, std::size_t ld_p, int num_rows, const Rows *tiles,
                    int num_tiles, int head_dim_v, float *acc, std::size_t ld_acc) noexcept;
  /// A tile's values as f32 rows [kPackedTokens, head_dim_v].
  void (*unpack_packed_values)(const void *tile, int head_dim_v, float *values) noexcept;

  // --- keys side by side: kt is [head_dim][kPackedTokens] f32 a tile, for many query rows ------

  void (*unpack_packed_keys)(const void *tile, int head_dim, float *kt) noexcept;
  /// The first num_keys <= kPackedTokens rows of k, the rest zeros; by Format.
  using TransposeFn = void(const Rows *k, int num_keys, int head_dim, float *kt) noexcept;
  TransposeFn *transpose_keys[kNumKvTypes];
  /// As qk, over num_tiles tiles that follow one another.
  void (*qk_transposed)(const float *q, std::size_t ld_q, int num_rows, const float *kt,
                        int num_tiles, int head_dim, float *scores, std::size_t ld_scores) noexcept;

  // --- one row of scores -----------------------------------------------------------------------

  /// Largest of n >= 1 values; -inf where all are. If any is NaN the result may be anything that
  /// is not above the largest number, or NaN: the NaN itself shows up in exp_sum.
  float (*row_max)(const float *x, std::size_t n) noexcept;
  /// x_j = exp(x_j - m) in place, and returns their sum. m finite; x_j <= m or NaN; exp(-inf)
  /// is exactly 0. Relative error below 3e-7 for results that are normal numbers; results below
  /// the smallest normal may be flushed to 0.
  float (*exp_sum)(float *x, std::size_t n, float m) noexcept;
  /// x_j = cap * tanh(x_j / cap) in place, cap > 0; -inf gives -cap (masks come after). Relative
  /// error below 1e-6.
  void (*soft_cap)(float *x, std::size_t n, float cap) noexcept;
  /// x_j *= f in place.
  void (*scale)(float *x, std::size_t n, float f) noexcept;
  /// y_j += f * x_j.
  void (*axpy)(float f, const float *x, float *y, std::size_t n) noexcept;

  // --- rows to packed Q4_0 ---------------------------------------------------------------------

  /// rows [kPackedTokens]: the row that rows[t] points to is quantised (the same bits as by
  /// quantize_row_q4_0) and becomes token t of the tile; where rows[t] is null, token t keeps its
  /// bits. By Format, f32 and f16; rows are no part of the tile.
  using PackFn = void(const void *const *rows, int head_dim, void *tile) noexcept;
  PackFn *pack_keys[kNumFloatTypes];
  PackFn *pack_values[kNumFloatTypes];

  // --- arithmetic in bf16 ----------------------------------------------------------------------

  /// Null where the instruction set has none.
  const Bf16Kernels *bf16;
};

} // namespace mixedkv
