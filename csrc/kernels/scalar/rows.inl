// Rows of any format: conversion, and attention over them. A format of blocks specialises
// BlockMath: quantize(x, block) of its values, value(block, i).

template <typename Block> struct BlockMath;

/// Values of a block.
template <typename Block> constexpr int kValuesOf = 32;
template <> constexpr int kValuesOf<block_nl4> = QNL4;

template <typename Block, typename Math = BlockMath<Block>>
void from_f32(const float *x, void *y, size_t n) noexcept {
  for (size_t b = 0; b < n / kValuesOf<Block>; ++b)
    Math::quantize(x + b * kValuesOf<Block>, static_cast<Block *>(y) + b);
}

template <typename Block, typename Math = BlockMath<Block>>
void from_f16(const f16_t *x, void *y, size_t n) noexcept {
  for (size_t b = 0; b < n / kValuesOf<Block>; ++b) {
    float block[kValuesOf<Block>];
    for (int i = 0; i < kValuesOf<Block>; ++i)
      block[i] = half_to_float(x[b * kValuesOf<Block> + static_cast<size_t>(i)]);
    Math::quantize(block, static_cast<Block *>(y) + b);
  }
}

float value_at(const float *row, int i) { return row[i]; }
float value_at(const f16_t *row, int i) { return half_to_float(row[i]); }
float value_at(const bf16_t *row, int i) { return bf16_to_float(row[i]); }
template <typename Block> float value_at(const Block *row, int i) {
  return BlockMath<Block>::value(row[i / kValuesOf<Block>], i % kValuesOf<Block>);
}

template <typename T> const T *row_at(const Rows &rows, int j) {
  const ptrdiff_t row = rows.index ? rows.index[j] : j;
  return reinterpret_cast<const T *>(static_cast<const char *>(rows.base) + rows.stride * row);
}

template <typename T> float row_value(const Rows &rows, int j, int i) {
  return value_at(row_at<T>(rows, j), i);
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
  enum : int { kDims = 64 }; // whose sums are held at a time
  for (int r = 0; r < num_rows; ++r)
    for (int j = 0; j < num_keys; j += kSumKeys)
      for (int i = 0; i < head_dim_v; i += kDims) {
        const int end = num_keys - j < kSumKeys ? num_keys : j + kSumKeys;
        const int dims = head_dim_v - i < kDims ? head_dim_v - i : +kDims;
        float sums[kDims] = {};
        for (int key = j; key < end; ++key) {
          const T *row = row_at<T>(*v, key);
          const float weight = p[static_cast<size_t>(r) * ld_p + static_cast<size_t>(key)];
          for (int d = 0; d < dims; ++d)
            sums[d] += weight * value_at(row, i + d);
        }
        for (int d = 0; d < dims; ++d)
          acc[static_cast<size_t>(r) * ld_acc + static_cast<size_t>(i + d)] += sums[d];
      }
}

template <typename T>
void transpose_keys(const Rows *k, int num_keys, int head_dim, float *kt) noexcept {
  for (int i = 0; i < head_dim; ++i)
    for (int j = 0; j < kTileTokens; ++j)
      *kt++ = j < num_keys ? value_at(row_at<T>(*k, j), i) : 0.0f;
}

void qk_transposed(const float *q, size_t ld_q, int num_rows, const float *kt, int num_tiles,
                   int head_dim, float *scores, size_t ld_scores) noexcept {
  for (int r = 0; r < num_rows; ++r)
    for (int j = 0; j < num_tiles * kTileTokens; ++j) {
      float sum = 0.0f;
      for (int i = 0; i < head_dim; ++i)
        sum += q[static_cast<size_t>(r) * ld_q + static_cast<size_t>(i)] *
               kt[(j / kTileTokens * head_dim + i) * kTileTokens + j % kTileTokens];
      scores[static_cast<size_t>(r) * ld_scores + static_cast<size_t>(j)] = sum;
    }
}

template <typename T> void to_f32(const void *x, float *y, size_t n) noexcept {
  for (size_t i = 0; i < n; ++i)
    y[i] = value_at(static_cast<const T *>(x), static_cast<int>(i));
}

template <typename T> void to_f16(const void *x, f16_t *y, size_t n) noexcept {
  for (size_t i = 0; i < n; ++i)
    y[i] = float_to_half(value_at(static_cast<const T *>(x), static_cast<int>(i)));
}

template <typename T> constexpr RowKernels attention_rows() {
  RowKernels k{};
  k.to_f32 = to_f32<T>;
  k.to_f16 = to_f16<T>;
  k.qk = qk<T>;
  k.pv = pv<T>;
  k.transpose_keys = transpose_keys<T>;
  k.key_panel = bf16_key_panel<T>;
  k.value_panels = bf16_value_panels<T>;
  return k;
}

template <typename Block> constexpr RowKernels block_rows() {
  RowKernels k = attention_rows<Block>();
  k.from_f32 = from_f32<Block>;
  k.from_f16 = from_f16<Block>;
  return k;
}

// --- f32, f16, bf16
// -----------------------------------------------------------------------------------

void f32_from_f32(const float *x, void *y, size_t n) noexcept { memcpy(y, x, n * sizeof(float)); }
void f32_from_f16(const f16_t *x, void *y, size_t n) noexcept {
  for (size_t i = 0; i < n; ++i)
    static_cast<float *>(y)[i] = half_to_float(x[i]);
}
void f16_from_f32(const float *x, void *y, size_t n) noexcept {
  for (size_t i = 0; i < n; ++i)
    static_cast<f16_t *>(y)[i] = float_to_half(x[i]);
}
void f16_from_f16(const f16_t *x, void *y, size_t n) noexcept { memcpy(y, x, n * sizeof(f16_t)); }
void f16_to_f16(const void *x, f16_t *y, size_t n) noexcept { memcpy(y, x, n * sizeof(f16_t)); }

constexpr RowKernels rows_f32() {
  RowKernels k = attention_rows<float>();
  k.from_f32 = f32_from_f32;
  k.from_f16 = f32_from_f16;
  return k;
}

constexpr RowKernels rows_f16() {
  RowKernels k = attention_rows<f16_t>();
  k.from_f32 = f16_from_f32;
  k.from_f16 = f16_from_f16;
  k.to_f16 = f16_to_f16;
  return k;
}

void bf16_from_f32(const float *x, void *y, size_t n) noexcept {
  for (size_t i = 0; i < n; ++i)
    static_cast<bf16_t *>(y)[i] = float_to_bf16(x[i]);
}
void bf16_from_f16(const f16_t *x, void *y, size_t n) noexcept {
  for (size_t i = 0; i < n; ++i)
    static_cast<bf16_t *>(y)[i] = float_to_bf16(half_to_float(x[i]));
}

constexpr RowKernels rows_bf16() {
  RowKernels k = attention_rows<bf16_t>();
  k.from_f32 = bf16_from_f32;
  k.from_f16 = bf16_from_f16;
  return k;
}
