// One row of scores: maximum, exponential, soft cap. In the vocabulary of vocabulary/common.h.

float row_max(const float *x, size_t n) noexcept {
  // Four chains, since a maximum takes several cycles and nothing else keeps the units busy.
  f32v max[4];
  for (int c = 0; c < 4; ++c)
    max[c] = set1(-INFINITY);
  size_t i = 0;
  for (; i + 4 * kLanes <= n; i += 4 * kLanes)
    for (int c = 0; c < 4; ++c)
      max[c] = max_or_second(load(x + i + static_cast<size_t>(c * kLanes)), max[c]);
  for (; i + kLanes <= n; i += kLanes)
    max[0] = max_or_second(load(x + i), max[0]);
  if (i < n)
    max[1] = max_or_second(load_n(x + i, static_cast<int>(n - i), -INFINITY), max[1]);
  return max_lanes(max_or_second(max_or_second(max[0], max[1]), max_or_second(max[2], max[3])));
}

/// exp(x + rest) for |x| < 88, rest far below x; anything for other numbers, NaN for NaN.
/// 2^n * exp(r) with n the nearest integer to x / ln 2 and |r| <= ln 2 / 2. ln 2 is split in two
/// so that n times its first part is exact. The polynomial (degree 6, its first two coefficients
/// 1, so that exp(0) is exactly 1) is a minimax fit, 3e-9 relative; rounding costs about 1e-7.
MIXEDKV_INLINE f32v exp_of(f32v x, f32v rest) {
  const f32v n = rint(mul(x, set1(1.44269504f)));
  f32v r = fma(n, set1(-0.693359375f), x);
  r = add(fma(n, set1(2.12194440e-4f), r), rest);
  f32v poly = fma(set1(1.381446262e-3f), r, set1(8.368780455e-3f));
  poly = fma(poly, r, set1(4.166839429e-2f));
  poly = fma(poly, r, set1(0.1666652011f));
  poly = fma(poly, r, set1(0.4999999341f));
  return scale_by_power(add(fma(mul(r, r), poly, r), set1(1.0f)), n);
}

/// exp(x - m). What the difference loses in rounding (up to 5e-6 where it is large) is found
/// exactly, by Knuth's two-sum, and given back.
MIXEDKV_INLINE f32v exp_of_difference(f32v x, f32v m) {
  const f32v difference = sub(x, m);
  const f32v virtual_m = sub(difference, x);
  const f32v rest = sub(sub(x, sub(difference, virtual_m)), add(m, virtual_m));
  // Just below ln(2^-126): what is smaller is not a normal number. Covers -inf, whose rest is NaN.
  return select_below(difference, set1(-87.33655f), zero(), exp_of(difference, rest));
}

float exp_sum(float *x, size_t n, float m) noexcept {
  const f32v max = set1(m);
  f32v sum = zero();
  size_t i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    const f32v e = exp_of_difference(load(x + i), max);
    store(x + i, e);
    sum = add(sum, e);
  }
  if (i < n) {
    const int rest = static_cast<int>(n - i);
    const f32v e = exp_of_difference(load_n(x + i, rest, -INFINITY), max);
    store_n(x + i, e, rest);
    sum = add(sum, e);
  }
  return sum_lanes(sum);
}

/// cap * tanh(x / cap). Near zero x plus an odd polynomial's higher terms (a minimax fit, 4e-9
/// relative), elsewhere 1 - 2 / (exp(2 y) + 1); each is inaccurate where the other is used.
MIXEDKV_INLINE f32v soft_capped(f32v x, f32v cap) {
  const f32v y = div(x, cap);
  const f32v z = mul(y, y);
  f32v poly = fma(set1(-5.704982782e-3f), z, set1(2.063908312e-2f));
  poly = fma(poly, z, set1(-5.373971369e-2f));
  poly = fma(poly, z, set1(0.1333144218f));
  poly = fma(poly, z, set1(-0.3333328194f));
  const f32v near_zero = fma(x, mul(z, poly), x);
  const f32v magnitude = abs_of(y);
  const f32v twice = min_or_second(set1(20.0f), add(magnitude, magnitude)); // tanh(10) rounds to 1
  const f32v tanh_y = sub(set1(1.0f), div(set1(2.0f), add(exp_of(twice, zero()), set1(1.0f))));
  return copy_sign(select_below(magnitude, set1(0.625f), near_zero, mul(cap, tanh_y)), x);
}

void soft_cap(float *x, size_t n, float cap) noexcept {
  const f32v caps = set1(cap);
  size_t i = 0;
  for (; i + kLanes <= n; i += kLanes)
    store(x + i, soft_capped(load(x + i), caps));
  if (i < n) {
    const int rest = static_cast<int>(n - i);
    store_n(x + i, soft_capped(load_n(x + i, rest), caps), rest);
  }
}

void scale(float *x, size_t n, float f) noexcept {
  size_t i = 0;
  for (; i + kLanes <= n; i += kLanes)
    store(x + i, mul(load(x + i), set1(f)));
  if (i < n) {
    const int rest = static_cast<int>(n - i);
    store_n(x + i, mul(load_n(x + i, rest), set1(f)), rest);
  }
}

void add_constants(const float *c, size_t ld_c, int num_rows, float *x, size_t ld_x,
                   int n) noexcept {
  for (int r = 0; r < num_rows; ++r, x += ld_x) {
    const f32v constant = set1(c[static_cast<size_t>(r) * ld_c]);
    int i = 0;
    for (; i + kLanes <= n; i += kLanes)
      store(x + i, add(load(x + i), constant));
    if (i < n)
      store_n(x + i, add(load_n(x + i, n - i), constant), n - i);
  }
}

void axpy(float f, const float *x, float *y, size_t n) noexcept {
  size_t i = 0;
  for (; i + kLanes <= n; i += kLanes)
    store(y + i, fma(set1(f), load(x + i), load(y + i)));
  if (i < n) {
    const int rest = static_cast<int>(n - i);
    store_n(y + i, fma(set1(f), load_n(x + i, rest), load_n(y + i, rest)), rest);
  }
}
