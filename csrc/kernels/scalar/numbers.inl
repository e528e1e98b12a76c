// Halves, bf16 and the bits of floats, by integer arithmetic.

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

bool is_finite(float x) { return (bits_of(x) & 0x7f800000u) != 0x7f800000u; }

bf16_t float_to_bf16(float x) {
  const uint32_t bits = bits_of(x);
  if ((bits & 0x7fffffffu) > 0x7f800000u)
    return {static_cast<uint16_t>(bits >> 16 | 0x40u)};
  return {static_cast<uint16_t>((bits + 0x7fffu + (bits >> 16 & 1u)) >> 16)};
}
float bf16_to_float(bf16_t x) { return float_of(static_cast<uint32_t>(x.bits) << 16); }

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

float largest_magnitude(const float *x, size_t n) noexcept {
  float largest = 0.0f;
  for (size_t i = 0; i < n; ++i)
    if (fabsf(x[i]) > largest)
      largest = fabsf(x[i]);
  return largest;
}
