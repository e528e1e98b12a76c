// Row conversions and checks of values, in the vocabulary of vocabulary/common.h.

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

/// In the lower half of every lane, the upper half's sign above it.
MIXEDKV_INLINE i32v round_to_bf16(f32v x) {
  const i32v bits = f32_as_bits(x);
  const i32v odd = and_i32(shift_right_signed<16>(bits), set1_i32(1));
  const i32v rounded = add_i32(bits, add_i32(odd, set1_i32(0x7fff)));
  // The sum keeps an infinity, and makes a NaN quiet, so that one of its upper bits is set.
  return shift_right_signed<16>(
      f32_as_bits(select_below(abs_of(x), set1(INFINITY), bits_as_f32(rounded), add(x, x))));
}

template <typename T> void row_to_bf16(const T *x, void *y, size_t n) noexcept {
  bf16_t *out = static_cast<bf16_t *>(y);
  size_t i = 0;
  for (; i + kLanes <= n; i += kLanes)
    store_halves(reinterpret_cast<int16_t *>(out + i), round_to_bf16(load(x + i)));
  if (i < n) {
    int16_t tail[kLanes];
    store_halves(tail, round_to_bf16(load_n(x + i, static_cast<int>(n - i))));
    memcpy(out + i, tail, (n - i) * sizeof(bf16_t));
  }
}

template <typename T> void bf16_row_to(const void *x, T *y, size_t n) noexcept {
  const bf16_t *in = static_cast<const bf16_t *>(x);
  size_t i = 0;
  for (; i + kLanes <= n; i += kLanes)
    store(y + i, load(in + i));
  if (i < n)
    store_n(y + i, load_n(in + i, static_cast<int>(n - i)), static_cast<int>(n - i));
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

float largest_magnitude(const float *x, size_t n) noexcept {
  f32v largest[4];
  for (int c = 0; c < 4; ++c)
    largest[c] = zero();
  size_t i = 0;
  for (; i + 4 * kLanes <= n; i += 4 * kLanes)
    for (int c = 0; c < 4; ++c)
      largest[c] = max_or_second(abs_of(load(x + i + static_cast<size_t>(c * kLanes))), largest[c]);
  for (; i + kLanes <= n; i += kLanes)
    largest[0] = max_or_second(abs_of(load(x + i)), largest[0]);
  if (i < n)
    largest[1] = max_or_second(abs_of(load_n(x + i, static_cast<int>(n - i))), largest[1]);
  return max_lanes(
      max_or_second(max_or_second(largest[0], largest[1]), max_or_second(largest[2], largest[3])));
}
