// The oracle: plain loops, one value at a time, no SIMD and nothing shared with the other ISA
// files, so that agreement with them means something. It is also the fallback of machines that
// nobody wrote vectors for. Speed was traded for plainness everywhere: f16 is converted by integer
// arithmetic, exp and tanh go through double.

#include "formats/token_tile.h"
#include "kernels/isa_tables.h"

#include <math.h>
#include <stdint.h>
#include <string.h>

namespace mixedkv {
namespace {

uint32_t bits_of(float x) {
  uint32_t bits;
  memcpy(&bits, &x, sizeof bits);
  return bits;
}

float float_of(uint32_t bits) {
  float x;
  memcpy(&x, &bits, sizeof x);
  return x;
}

/// NaNs become quiet and keep sign and leading payload bits, as x86 and Arm instructions do it.
float half_to_float(f16_t h) {
  const uint32_t sign = static_cast<uint32_t>(h & 0x8000u) << 16;
  const uint32_t exponent = (h >> 10) & 31u;
  const uint32_t mantissa = h & 0x3ffu;
  if (exponent == 31)
    return float_of(sign | 0x7f800000u | (mantissa ? 0x400000u | mantissa << 13 : 0u));
  if (exponent == 0) { // zero or subnormal: mantissa * 2^-24, exact in f32
    const float magnitude = static_cast<float>(mantissa) * (1.0f / 16777216.0f);
    return float_of(sign | bits_of(magnitude));
  }
  return float_of(sign | (exponent + 112u) << 23 | mantissa << 13);
}

f16_t float_to_half(float x) {
  const uint32_t bits = bits_of(x);
  const uint32_t sign = (bits >> 16) & 0x8000u;
  const uint32_t magnitude = bits & 0x7fffffffu;
  if (magnitude > 0x7f800000u)
    return static_cast<f16_t>(sign | 0x7e00u | ((magnitude >> 13) & 0x3ffu));
  if (magnitude >= 0x477ff000u) // from 65520 on, half way beyond the largest f16
    return static_cast<f16_t>(sign | 0x7c00u);
  uint32_t kept, dropped, half;
  if (magnitude < 0x38800000u) { // below 2^-14: a multiple of 2^-24
    const uint32_t exponent = magnitude >> 23;
    if (exponent < 102) // below 2^-25
      return static_cast<f16_t>(sign);
    const uint32_t shift = 126u - exponent; // 14 to 24
    const uint32_t mantissa = (magnitude & 0x7fffffu) | 0x800000u;
    kept = mantissa >> shift;
    dropped = mantissa & ((1u << shift) - 1u);
    half = 1u << (shift - 1u);
  } else {
    kept = (magnitude - 0x38000000u) >> 13;
    dropped = magnitude & 0x1fffu;
    half = 0x1000u;
  }
  // A carry out of the mantissa runs into the exponent, which is what rounding up means there.
  if (dropped > half || (dropped == half && (kept & 1u)))
    ++kept;
  return static_cast<f16_t>(sign | kept);
}

void f32_to_f16(const float *x, f16_t *y, size_t n) noexcept {
  for (size_t i = 0; i < n; ++i)
    y[i] = float_to_half(x[i]);
}

void f16_to_f32(const f16_t *x, float *y, size_t n) noexcept {
  for (size_t i = 0; i < n; ++i)
    y[i] = half_to_float(x[i]);
}

bool is_finite(float x) { return (bits_of(x) & 0x7f800000u) != 0x7f800000u; }

void quantize_block(const float *x, block_q4_0 *y) {
  float largest = 0.0f; // magnitude
  float max = 0.0f;     // the first value that has it; a block of zeros of any sign gives +0
  for (int i = 0; i < QK4_0; ++i) {
    if (!is_finite(x[i])) {
      y->d = 0x7e00u;
      memset(y->qs, 0, sizeof y->qs);
      return;
    }
    const float magnitude = float_of(bits_of(x[i]) & 0x7fffffffu);
    if (magnitude > largest) {
      largest = magnitude;
      max = x[i];
    }
  }
  const float d = max / -8.0f;
  float id = d == 0.0f ? 0.0f : 1.0f / d;
  if (!is_finite(id))
    id = 0.0f;
  y->d = float_to_half(d);
  for (int i = 0; i < QK4_0 / 2; ++i) {
    const float low_product = x[i] * id;
    const float high_product = x[i + QK4_0 / 2] * id;
    const int low = static_cast<int>(low_product + 8.5f);
    const int high = static_cast<int>(high_product + 8.5f);
    y->qs[i] = static_cast<uint8_t>((low < 15 ? low : 15) | (high < 15 ? high : 15) << 4);
  }
}

void quantize_row_q4_0_f32(const float *x, block_q4_0 *y, size_t n) noexcept {
  for (size_t b = 0; b < n / QK4_0; ++b)
    quantize_block(x + b * QK4_0, y + b);
}

void quantize_row_q4_0_f16(const f16_t *x, block_q4_0 *y, size_t n) noexcept {
  for (size_t b = 0; b < n / QK4_0; ++b) {
    float block[QK4_0];
    f16_to_f32(x + b * QK4_0, block, QK4_0);
    quantize_block(block, y + b);
  }
}

float dequantize(const block_q4_0 &block, int i) {
  const int half = QK4_0 / 2;
  const int q = i < half ? block.qs[i] & 15 : block.qs[i - half] >> 4;
  return static_cast<float>(q - 8) * half_to_float(block.d);
}

void dequantize_row_q4_0_f32(const block_q4_0 *x, float *y, size_t n) noexcept {
  for (size_t i = 0; i < n / QK4_0 * QK4_0; ++i)
    y[i] = dequantize(x[i / QK4_0], static_cast<int>(i % QK4_0));
}

void dequantize_row_q4_0_f16(const block_q4_0 *x, f16_t *y, size_t n) noexcept {
  for (size_t i = 0; i < n / QK4_0 * QK4_0; ++i)
    y[i] = float_to_half(dequantize(x[i / QK4_0], static_cast<int>(i % QK4_0)));
}

bool all_finite_f32(const float *x, size_t n) noexcept {
  for (size_t i = 0; i < n; ++i)
    if (!is_finite(x[i]))
      return false;
  return true;
}

bool all_finite_f16(const f16_t *x, size_t n) noexcept {
  for (size_t i = 0; i < n; ++i)
    if ((x[i] & 0x7c00u) == 0x7c00u)
      return false;
  return true;
}

float value_at(const float *row, int i) { return row[i]; }
float value_at(const f16_t *row, int i) { return half_to_float(row[i]); }
float value_at(const block_q4_0 *row, int i) { return dequantize(row[i / QK4_0], i % QK4_0); }

template <typename T> const T *row_at(const Rows &rows, int j) {
  const ptrdiff_t row = rows.index ? rows.index[j] : j;
  return reinterpret_cast<const T *>(static_cast<const char *>(rows.base) + rows.stride * row);
}

template <typename T>
void qk(const float *q, size_t ld_q, int num_rows, const Rows *k, int num_keys, int head_dim,
        float *scores, size_t ld_scores) noexcept {
  for (int r = 0; r < num_rows; ++r)
    for (int j = 0; j < num_keys; ++j) {
      const T *row = row_at<T>(*k, j);
      float sum = 0.0f;
      for (int i = 0; i < head_dim; ++i)
        sum += q[static_cast<size_t>(r) * ld_q + static_cast<size_t>(i)] * value_at(row, i);
      scores[static_cast<size_t>(r) * ld_scores + static_cast<size_t>(j)] = sum;
    }
}

template <typename T>
void pv(const float *p, size_t ld_p, int num_rows, const Rows *v, int num_keys, int head_dim_v,
        float *acc, size_t ld_acc) noexcept {
  for (int r = 0; r < num_rows; ++r)
    for (int j = 0; j < num_keys; ++j) {
      const T *row = row_at<T>(*v, j);
      const float weight = p[static_cast<size_t>(r) * ld_p + static_cast<size_t>(j)];
      for (int i = 0; i < head_dim_v; ++i)
        acc[static_cast<size_t>(r) * ld_acc + static_cast<size_t>(i)] += weight * value_at(row, i);
    }
}

// Packed Q4_0, value by value; a prepared query is the query.

block_q4_0 packed_key(const uint8_t *tile, int num_blocks, int block, int token) {
  block_q4_0 rows[1];
  for (int w = 0; w < 4; ++w)
    memcpy(rows[0].qs + 4 * w, tile + block * kPackedBlockBytes + w * 4 * kPackedTokens + token * 4,
           4);
  rows[0].d = *packed_scale(tile, num_blocks, block, token);
  return rows[0];
}

float packed_value(const uint8_t *tile, int num_blocks, int i, int token) {
  uint32_t word;
  memcpy(&word, tile + (token / 8 * num_blocks * QK4_0 + i) * 4, sizeof word);
  const int nibble = static_cast<int>((word >> packed_value_shift(token) & 15u) ^ 8u);
  return static_cast<float>(nibble - 8) *
         half_to_float(*packed_scale(tile, num_blocks, i / QK4_0, token));
}

void prepare_packed_query(const float *q, size_t ld_q, int num_rows, int head_dim,
                          float *prepared) noexcept {
  const size_t n = static_cast<size_t>(head_dim);
  for (size_t r = 0; r < static_cast<size_t>(num_rows); ++r)
    memcpy(prepared + r * packed_query_floats(n), q + r * ld_q, n * sizeof(float));
}

void qk_packed(const float *prepared, int num_rows, const Rows *tiles, int num_tiles, int head_dim,
               float *scores, size_t ld_scores) noexcept {
  const int num_blocks = head_dim / QK4_0;
  const size_t ld = packed_query_floats(static_cast<size_t>(head_dim));
  for (int t = 0; t < num_tiles; ++t)
    for (int token = 0; token < kPackedTokens; ++token)
      for (int r = 0; r < num_rows; ++r) {
        const float *q = prepared + static_cast<size_t>(r) * ld;
        float sum = 0.0f;
        for (int b = 0; b < num_blocks; ++b) {
          const block_q4_0 block = packed_key(row_at<uint8_t>(*tiles, t), num_blocks, b, token);
          for (int i = 0; i < QK4_0; ++i)
            sum += q[b * QK4_0 + i] * dequantize(block, i);
        }
        scores[static_cast<size_t>(r) * ld_scores +
               static_cast<size_t>(t * kPackedTokens + token)] = sum;
      }
}

void pv_packed(const float *p, size_t ld_p, int num_rows, const Rows *tiles, int num_tiles,
               int head_dim_v, float *acc, size_t ld_acc) noexcept {
  for (int r = 0; r < num_rows; ++r)
    for (int j = 0; j < num_tiles * kPackedTokens; ++j) {
      const float weight = p[static_cast<size_t>(r) * ld_p + static_cast<size_t>(j)];
      if (weight == 0.0f)
        continue;
      const uint8_t *tile = row_at<uint8_t>(*tiles, j / kPackedTokens);
      for (int i = 0; i < head_dim_v; ++i)
        acc[static_cast<size_t>(r) * ld_acc + static_cast<size_t>(i)] +=
            weight * packed_value(tile, head_dim_v / QK4_0, i, j % kPackedTokens);
    }
}

void unpack_packed_values(const void *tile, int head_dim_v, float *values) noexcept {
  for (int token = 0; token < kPackedTokens; ++token)
    for (int i = 0; i < head_dim_v; ++i)
      *values++ = packed_value(static_cast<const uint8_t *>(tile), head_dim_v / QK4_0, i, token);
}

void unpack_packed_keys(const void *tile, int head_dim, float *kt) noexcept {
  for (int i = 0; i < head_dim; ++i)
    for (int token = 0; token < kPackedTokens; ++token)
      *kt++ = dequantize(
          packed_key(static_cast<const uint8_t *>(tile), head_dim / QK4_0, i / QK4_0, token),
          i % QK4_0);
}

template <typename T>
void transpose_keys(const Rows *k, int num_keys, int head_dim, float *kt) noexcept {
  for (int i = 0; i < head_dim; ++i)
    for (int j = 0; j < kPackedTokens; ++j)
      *kt++ = j < num_keys ? value_at(row_at<T>(*k, j), i) : 0.0f;
}

void qk_transposed(const float *q, size_t ld_q, int num_rows, const float *kt, int num_tiles,
                   int head_dim, float *scores, size_t ld_scores) noexcept {
  for (int r = 0; r < num_rows; ++r)
    for (int j = 0; j < num_tiles * kPackedTokens; ++j) {
      float sum = 0.0f;
      for (int i = 0; i < head_dim; ++i)
        sum += q[static_cast<size_t>(r) * ld_q + static_cast<size_t>(i)] *
               kt[(j / kPackedTokens * head_dim + i) * kPackedTokens + j % kPackedTokens];
      scores[static_cast<size_t>(r) * ld_scores + static_cast<size_t>(j)] = sum;
    }
}

float row_max(const float *x, size_t n) noexcept {
  float max = -INFINITY;
  for (size_t i = 0; i < n; ++i)
    if (x[i] > max)
      max = x[i];
  return max;
}

float exp_sum(float *x, size_t n, float m) noexcept {
  float sum = 0.0f;
  for (size_t i = 0; i < n; ++i) {
    x[i] = static_cast<float>(exp(static_cast<double>(x[i]) - static_cast<double>(m)));
    sum += x[i];
  }
  return sum;
}

void soft_cap(float *x, size_t n, float cap) noexcept {
  for (size_t i = 0; i < n; ++i)
    x[i] = static_cast<float>(cap * tanh(static_cast<double>(x[i]) / cap));
}

void scale(float *x, size_t n, float f) noexcept {
  for (size_t i = 0; i < n; ++i)
    x[i] *= f;
}

void axpy(float f, const float *x, float *y, size_t n) noexcept {
  for (size_t i = 0; i < n; ++i)
    y[i] += f * x[i];
}

void quantize_row(const float *x, block_q4_0 *y) { quantize_row_q4_0_f32(x, y, QK4_0); }
void quantize_row(const f16_t *x, block_q4_0 *y) { quantize_row_q4_0_f16(x, y, QK4_0); }

template <typename T> void pack_keys(const void *const *rows, int head_dim, void *tile) noexcept {
  uint8_t *bytes = static_cast<uint8_t *>(tile);
  for (int token = 0; token < kPackedTokens; ++token)
    for (int b = 0; rows[token] && b < head_dim / QK4_0; ++b) {
      block_q4_0 block;
      quantize_row(static_cast<const T *>(rows[token]) + b * QK4_0, &block);
      for (int i = 0; i < QK4_0 / 2; ++i)
        bytes[b * kPackedBlockBytes + (i / 4 * kPackedTokens + token) * 4 + i % 4] = block.qs[i];
      *packed_scale(bytes, head_dim / QK4_0, b, token) = block.d;
    }
}

template <typename T>
void pack_values(const void *const *rows, int head_dim_v, void *tile) noexcept {
  uint8_t *bytes = static_cast<uint8_t *>(tile);
  for (int token = 0; token < kPackedTokens; ++token)
    for (int b = 0; rows[token] && b < head_dim_v / QK4_0; ++b) {
      block_q4_0 block;
      quantize_row(static_cast<const T *>(rows[token]) + b * QK4_0, &block);
      for (int i = 0; i < QK4_0; ++i) {
        const int q = i < QK4_0 / 2 ? block.qs[i] & 15 : block.qs[i - QK4_0 / 2] >> 4;
        const uint32_t nibble = static_cast<uint32_t>(q - 8) & 15u;
        uint8_t *at = bytes + (token / 8 * head_dim_v + b * QK4_0 + i) * 4;
        uint32_t word;
        memcpy(&word, at, sizeof word);
        word &= ~(15u << packed_value_shift(token));
        word |= nibble << packed_value_shift(token);
        memcpy(at, &word, sizeof word);
      }
      *packed_scale(bytes, head_dim_v / QK4_0, b, token) = block.d;
    }
}

#include "kernels/scalar/bf16.inl"

} // namespace

const Kernels kernels_scalar = {
    "scalar",
    f32_to_f16,
    f16_to_f32,
    quantize_row_q4_0_f32,
    quantize_row_q4_0_f16,
    dequantize_row_q4_0_f32,
    dequantize_row_q4_0_f16,
    all_finite_f32,
    all_finite_f16,
    {qk<float>, qk<f16_t>, qk<block_q4_0>},
    {pv<float>, pv<f16_t>, pv<block_q4_0>},
    prepare_packed_query,
    qk_packed,
    pv_packed,
    unpack_packed_values,
    unpack_packed_keys,
    {transpose_keys<float>, transpose_keys<f16_t>, transpose_keys<block_q4_0>},
    qk_transposed,
    row_max,
    exp_sum,
    soft_cap,
    scale,
    axpy,
    {pack_keys<float>, pack_keys<f16_t>},
    {pack_values<float>, pack_values<f16_t>},
    &bf16_kernels,
};

} // namespace mixedkv
