// Values to Q4_0, in the vocabulary of simd_common.h.
//
// The value of largest magnitude with its sign comes from two integer maxima over the bits of the
// floats: the largest signed integer is the largest positive value, the largest unsigned one is the
// negative value of largest magnitude, and both order infinities and NaNs above all numbers, so
// that one comparison finds these. Only where a positive and a negative value share the largest
// magnitude does the first of them have to be searched for, one by one; in real data that is rare.
// Tried and rejected: a running maximum of magnitudes beside the values they came from (two
// dependent blends a step, and ties between lanes need indices on top).

MIXEDKV_INLINE uint32_t bits_of(float x) {
  uint32_t bits;
  memcpy(&bits, &x, sizeof bits);
  return bits;
}

MIXEDKV_INLINE float float_of(uint32_t bits) {
  float x;
  memcpy(&x, &bits, sizeof x);
  return x;
}

/// Of the first of 32 values whose magnitude has these bits, the sign.
inline uint32_t first_sign(const f32v *x, uint32_t magnitude) noexcept {
  float values[QK4_0];
  for (int i = 0; i < QK4_0 / kLanes; ++i)
    store(values + i * kLanes, x[i]);
  int i = 0;
  while ((bits_of(values[i]) & 0x7fffffffu) != magnitude)
    ++i;
  return bits_of(values[i]) & 0x80000000u;
}

template <typename T> MIXEDKV_INLINE void quantize_block(const T *source, block_q4_0 *y) {
  constexpr int kVectors = QK4_0 / kLanes;
  f32v x[kVectors];
  for (int i = 0; i < kVectors; ++i)
    x[i] = load(source + i * kLanes);

  int32_t largest_signed;
  uint32_t largest_unsigned;
  find_extremes(x, largest_signed, largest_unsigned);
  const uint32_t positive = largest_signed > 0 ? static_cast<uint32_t>(largest_signed) : 0u;
  const uint32_t negative = largest_unsigned >> 31 ? largest_unsigned & 0x7fffffffu : 0u;
  const uint32_t magnitude = positive > negative ? positive : negative;
  if (magnitude >= 0x7f800000u) {
    y->d = 0x7e00u;
    memset(y->qs, 0, sizeof y->qs);
    return;
  }
  uint32_t sign = positive > negative ? 0u : 0x80000000u;
  if (positive == negative) // of zeros of either sign, ggml takes the largest to be +0
    sign = magnitude ? first_sign(x, magnitude) : 0u;

  const float d = float_of(sign | magnitude) / -8.0f;
  float id = 1.0f / d;
  if ((bits_of(id) & 0x7f800000u) == 0x7f800000u) // d is zero, or too small to have an inverse
    id = 0.0f;
  y->d = to_half(d);
  // Two roundings, product and sum: an FMA here would give other bytes.
  for (int i = 0; i < kVectors; ++i)
    x[i] = add(mul(x[i], set1(id)), set1(8.5f));
  store_q4(y->qs, x);
}

void quantize_row_q4_0_f32(const float *x, block_q4_0 *y, size_t n) noexcept {
  for (size_t b = 0; b < n / QK4_0; ++b)
    quantize_block(x + b * QK4_0, y + b);
}

void quantize_row_q4_0_f16(const f16_t *x, block_q4_0 *y, size_t n) noexcept {
  for (size_t b = 0; b < n / QK4_0; ++b)
    quantize_block(x + b * QK4_0, y + b);
}
