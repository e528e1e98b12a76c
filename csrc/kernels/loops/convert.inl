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
