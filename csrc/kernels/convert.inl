// Row conversions and checks of values, in the vocabulary of simd_common.h.

void f32_to_f16(const float *x, f16_t *y, size_t n) noexcept {
  size_t i = 0;
  for (; i + kLanes <= n; i += kLanes)
    store(y + i, load(x + i));
  if (i < n)
    store_n(y + i, load_n(x + i, static_cast<int>(n - i)), static_cast<int>(n - i));
}

void f16_to_f32(const f16_t *x, float *y, size_t n) noexcept {
  size_t i = 0;
  for (; i + kLanes <= n; i += kLanes)
    store(y + i, load(x + i));
  if (i < n)
    store_n(y + i, load_n(x + i, static_cast<int>(n - i)), static_cast<int>(n - i));
}

bool all_finite_f32(const float *x, size_t n) noexcept {
  size_t i = 0;
  for (; i + kLanes <= n; i += kLanes)
    if (any_not_finite(load(x + i)))
      return false;
  return i == n || !any_not_finite(load_n(x + i, static_cast<int>(n - i)));
}

bool all_finite_f16(const f16_t *x, size_t n) noexcept {
  size_t i = 0;
  for (; i + 16 <= n; i += 16)
    if (any_not_finite_16(x + i))
      return false;
  for (; i < n; ++i)
    if ((x[i] & 0x7c00u) == 0x7c00u)
      return false;
  return true;
}

// --- Q4_0 to values ------------------------------------------------------------------------------

template <int H, typename T> MIXEDKV_INLINE void store_pairs(const Q4 &q4, T *y) {
  f32v low, high;
  q4_pair<H>(q4, low, high);
  store(y + H * kLanes, low);
  store(y + QK4_0 / 2 + H * kLanes, high);
  if constexpr (H + 1 < kPairs)
    store_pairs<H + 1>(q4, y);
}

/// An infinite or NaN d, where the vocabulary's ways to a value may not be exact.
MIXEDKV_INLINE f32v q4_value_slow(const block_q4_0 *block, int i) {
  const f16_t halves[kLanes] = {block->d};
  const int byte = block->qs[i % (QK4_0 / 2)];
  const int q = i < QK4_0 / 2 ? byte & 15 : byte >> 4;
  return mul(set1(static_cast<float>(q - 8)), load(halves));
}

template <typename T>
MIXEDKV_INLINE void dequantize_row(const block_q4_0 *x, T *y, size_t n) {
  for (size_t b = 0; b < n / QK4_0; ++b, y += QK4_0) {
    if ((x[b].d & 0x7c00u) != 0x7c00u)
      store_pairs<0>(q4_open(x + b), y);
    else
      for (int i = 0; i < QK4_0; ++i)
        store_n(y + i, q4_value_slow(x + b, i), 1);
  }
}

void dequantize_row_q4_0_f32(const block_q4_0 *x, float *y, size_t n) noexcept {
  dequantize_row(x, y, n);
}

void dequantize_row_q4_0_f16(const block_q4_0 *x, f16_t *y, size_t n) noexcept {
  dequantize_row(x, y, n);
}
