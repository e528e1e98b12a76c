// Vector vocabulary of Advanced SIMD on aarch64 (the base instruction set, no extension): 4 lanes,
// 32 registers. Meanings of the words: vocabulary/common.h.

constexpr int kLanes = 4;
using f32v = float32x4_t;

MIXEDKV_INLINE f32v zero() { return vdupq_n_f32(0.0f); }
MIXEDKV_INLINE f32v set1(float x) { return vdupq_n_f32(x); }
MIXEDKV_INLINE f32v load(const float *p) { return vld1q_f32(p); }
MIXEDKV_INLINE f32v load(const f16_t *p) { return vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(p))); }
MIXEDKV_INLINE f32v load_n(const float *p, int n, float fill = 0.0f) {
  float buffer[kLanes] = {fill, fill, fill, fill};
  for (int i = 0; i < n; ++i)
    buffer[i] = p[i];
  return load(buffer);
}
MIXEDKV_INLINE f32v load_n(const f16_t *p, int n) {
  f16_t buffer[kLanes] = {0, 0, 0, 0};
  for (int i = 0; i < n; ++i)
    buffer[i] = p[i];
  return load(buffer);
}
MIXEDKV_INLINE f32v load(const bf16_t *p) {
  return vreinterpretq_f32_u32(vshll_n_u16(vld1_u16(&p->bits), 16));
}
MIXEDKV_INLINE f32v load_n(const bf16_t *p, int n) {
  bf16_t buffer[kLanes] = {};
  memcpy(buffer, p, static_cast<size_t>(n) * sizeof(bf16_t));
  return load(buffer);
}
MIXEDKV_INLINE f32v load(const int8_t *p) {
  int32_t bytes;
  memcpy(&bytes, p, sizeof bytes);
  const int16x8_t halves = vmovl_s8(vreinterpret_s8_s32(vdup_n_s32(bytes)));
  return vcvtq_f32_s32(vmovl_s16(vget_low_s16(halves)));
}
MIXEDKV_INLINE f32v set1_half(f16_t x) { return vcvt_f32_f16(vreinterpret_f16_u16(vdup_n_u16(x))); }
MIXEDKV_INLINE void store(float *p, f32v x) { vst1q_f32(p, x); }
MIXEDKV_INLINE void store_n(float *p, f32v x, int n) {
  float buffer[kLanes];
  store(buffer, x);
  for (int i = 0; i < n; ++i)
    p[i] = buffer[i];
}
MIXEDKV_INLINE void store(f16_t *p, f32v x) { vst1_u16(p, vreinterpret_u16_f16(vcvt_f16_f32(x))); }
MIXEDKV_INLINE void store_n(f16_t *p, f32v x, int n) {
  f16_t buffer[kLanes];
  store(buffer, x);
  for (int i = 0; i < n; ++i)
    p[i] = buffer[i];
}

MIXEDKV_INLINE f32v add(f32v a, f32v b) { return vaddq_f32(a, b); }
MIXEDKV_INLINE f32v sub(f32v a, f32v b) { return vsubq_f32(a, b); }
MIXEDKV_INLINE f32v mul(f32v a, f32v b) { return vmulq_f32(a, b); }
MIXEDKV_INLINE f32v div(f32v a, f32v b) { return vdivq_f32(a, b); }
MIXEDKV_INLINE f32v fma(f32v a, f32v b, f32v c) { return vfmaq_f32(c, a, b); }
MIXEDKV_INLINE f32v rint(f32v x) { return vrndnq_f32(x); }
/// x in [0.5, 2], n an integer in [-126, 127]: added to the exponent.
MIXEDKV_INLINE f32v scale_by_power(f32v x, f32v n) {
  const int32x4_t exponent = vshlq_n_s32(vcvtq_s32_f32(n), 23);
  return vreinterpretq_f32_s32(vaddq_s32(vreinterpretq_s32_f32(x), exponent));
}
MIXEDKV_INLINE f32v max_bits(f32v a, f32v b) {
  return vreinterpretq_f32_u32(vmaxq_u32(vreinterpretq_u32_f32(a), vreinterpretq_u32_f32(b)));
}
MIXEDKV_INLINE f32v select_below(f32v x, f32v y, f32v a, f32v b) {
  return vbslq_f32(vcltq_f32(x, y), a, b);
}
MIXEDKV_INLINE bool any_below(f32v x, f32v y) { return vmaxvq_u32(vcltq_f32(x, y)) != 0; }
MIXEDKV_INLINE f32v max_or_second(f32v a, f32v b) { return vbslq_f32(vcgtq_f32(a, b), a, b); }
MIXEDKV_INLINE f32v min_or_second(f32v a, f32v b) { return vbslq_f32(vcltq_f32(a, b), a, b); }
MIXEDKV_INLINE f32v abs_of(f32v x) { return vabsq_f32(x); }
MIXEDKV_INLINE f32v copy_sign(f32v a, f32v s) { return vbslq_f32(vdupq_n_u32(0x80000000u), s, a); }

template <int H> MIXEDKV_INLINE f32v swap_lanes(f32v x) {
  if constexpr (H == 1)
    return vrev64q_f32(x);
  else
    return vextq_f32(x, x, 2);
}

/// Lane k of the result is the sum of the lanes of the k-th vector.
MIXEDKV_INLINE float32x4_t sums4(f32v a, f32v b, f32v c, f32v d) {
  return vpaddq_f32(vpaddq_f32(a, b), vpaddq_f32(c, d));
}
MIXEDKV_INLINE void sum4(float *out, f32v a, f32v b, f32v c, f32v d) {
  vst1q_f32(out, sums4(a, b, c, d));
}
MIXEDKV_INLINE float sum_lanes(f32v x) { return vaddvq_f32(x); }
MIXEDKV_INLINE float max_lanes(f32v x) { return vmaxvq_f32(x); }

MIXEDKV_INLINE bool any_not_finite(f32v x) {
  const uint32x4_t exponent = vdupq_n_u32(0x7f800000u);
  return vmaxvq_u32(vceqq_u32(vandq_u32(vreinterpretq_u32_f32(x), exponent), exponent)) != 0;
}
MIXEDKV_INLINE bool any_not_finite_16(const f16_t *p) {
  const uint16x8_t exponent = vdupq_n_u16(0x7c00u);
  const uint16x8_t a = vceqq_u16(vandq_u16(vld1q_u16(p), exponent), exponent);
  const uint16x8_t b = vceqq_u16(vandq_u16(vld1q_u16(p + 8), exponent), exponent);
  return vmaxvq_u16(vorrq_u16(a, b)) != 0;
}

// --- Q4_0: a nibble n becomes the float 16 + n without a conversion: its bits are the top bits of
// the mantissa, so that the upper half of the float is the byte 1nnnn000 below the byte 0x41. Two
// zips put these in place. (16 + n) * d - 24 * d is (n - 8) * d exactly, since
// d has 11 bits. --------------------------------------------------------------------------------

struct Q4 {
  uint16x8_t low[2], high[2]; ///< upper halves of floats
  f32v d;
  f32v minus_24d;
};
MIXEDKV_INLINE Q4 q4_open(const block_q4_0 *block) {
  const uint8x16_t bytes = vld1q_u8(block->qs);
  const uint8x16_t sign_and_exponent = vdupq_n_u8(0x41), last_exponent_bit = vdupq_n_u8(0x80);
  const uint8x16_t low = vorrq_u8(vshrq_n_u8(vshlq_n_u8(bytes, 4), 1), last_exponent_bit);
  const uint8x16_t high = vorrq_u8(vshlq_n_u8(vshrq_n_u8(bytes, 4), 3), last_exponent_bit);
  const float32x4_t d = vcvt_f32_f16(vreinterpret_f16_u16(vdup_n_u16(block->d)));
  Q4 q4;
  q4.low[0] = vreinterpretq_u16_u8(vzip1q_u8(low, sign_and_exponent));
  q4.low[1] = vreinterpretq_u16_u8(vzip2q_u8(low, sign_and_exponent));
  q4.high[0] = vreinterpretq_u16_u8(vzip1q_u8(high, sign_and_exponent));
  q4.high[1] = vreinterpretq_u16_u8(vzip2q_u8(high, sign_and_exponent));
  q4.d = d;
  q4.minus_24d = vmulq_n_f32(d, -24.0f);
  return q4;
}
/// 16 + n for four nibbles n.
template <int V> MIXEDKV_INLINE f32v q4_nibbles(const Q4 &q4) {
  const uint16x8_t nothing = vdupq_n_u16(0), eight = V < 4 ? q4.low[V / 2 % 2] : q4.high[V / 2 % 2];
  return vreinterpretq_f32_u16(V % 2 ? vzip2q_u16(nothing, eight) : vzip1q_u16(nothing, eight));
}
template <int V> MIXEDKV_INLINE f32v q4_vector(const Q4 &q4) {
  return vfmaq_f32(q4.minus_24d, q4_nibbles<V>(q4), q4.d);
}
template <int V> MIXEDKV_INLINE f32v q4_vector_exact(const Q4 &q4) {
  return vmulq_f32(vsubq_f32(q4_nibbles<V>(q4), vdupq_n_f32(24.0f)), q4.d);
}

/// Sixteen levels are bytes of one register, which tbl looks up.
struct Levels {
  int16x8_t low[2], high[2];
  f32v d;
};
MIXEDKV_INLINE Levels open_levels(const int8_t *levels, f16_t d, uint8x16_t bytes) {
  const int8x16_t table = vld1q_s8(levels);
  const int8x16_t low = vqtbl1q_s8(table, vandq_u8(bytes, vdupq_n_u8(15)));
  const int8x16_t high = vqtbl1q_s8(table, vshrq_n_u8(bytes, 4));
  return {{vmovl_s8(vget_low_s8(low)), vmovl_high_s8(low)},
          {vmovl_s8(vget_low_s8(high)), vmovl_high_s8(high)},
          set1_half(d)};
}
template <int V> MIXEDKV_INLINE f32v level(const Levels &x) {
  const int16x8_t eight = V < 4 ? x.low[V / 2 % 2] : x.high[V / 2 % 2];
  const int32x4_t four = V % 2 ? vmovl_high_s16(eight) : vmovl_s16(vget_low_s16(eight));
  return vmulq_f32(vcvtq_f32_s32(four), x.d);
}

/// Of 32 values: the bits of the largest as signed integers (negative where none has a clear sign
/// bit) and as unsigned ones (below 2^31 where none has a set one).
MIXEDKV_INLINE void find_extremes(const f32v *x, int32_t &largest_signed,
                                  uint32_t &largest_unsigned) {
  int32x4_t s = vreinterpretq_s32_f32(x[0]);
  uint32x4_t u = vreinterpretq_u32_f32(x[0]);
  for (int i = 1; i < 8; ++i) {
    s = vmaxq_s32(s, vreinterpretq_s32_f32(x[i]));
    u = vmaxq_u32(u, vreinterpretq_u32_f32(x[i]));
  }
  largest_signed = vmaxvq_s32(s);
  largest_unsigned = vmaxvq_u32(u);
}

/// Of kQuantBlocks blocks, the i-th of 32 values at source(i), what find_extremes finds: block i's
/// in lane i, as floats.
constexpr int kQuantBlocks = 8;
template <typename T, typename F>
MIXEDKV_INLINE void find_group_extremes(F source, f32v (&top)[2], f32v (&bottom)[2]) {
  if constexpr (sizeof(T) == sizeof(float)) {
    int32x4_t s[kQuantBlocks];
    uint32x4_t u[kQuantBlocks];
    for (int b = 0; b < kQuantBlocks; ++b) {
      u[b] = vreinterpretq_u32_f32(load(source(b)));
      s[b] = vreinterpretq_s32_u32(u[b]);
      for (int i = kLanes; i < QK4_0; i += kLanes) {
        const uint32x4_t x = vreinterpretq_u32_f32(load(source(b) + i));
        u[b] = vmaxq_u32(u[b], x);
        s[b] = vmaxq_s32(s[b], vreinterpretq_s32_u32(x));
      }
    }
    for (int i = 0; i < 2; ++i) {
      top[i] = vreinterpretq_f32_s32(
          vpmaxq_s32(vpmaxq_s32(s[4 * i], s[4 * i + 1]), vpmaxq_s32(s[4 * i + 2], s[4 * i + 3])));
      bottom[i] = vreinterpretq_f32_u32(
          vpmaxq_u32(vpmaxq_u32(u[4 * i], u[4 * i + 1]), vpmaxq_u32(u[4 * i + 2], u[4 * i + 3])));
    }
  } else {
    int16x8_t s[kQuantBlocks];
    uint16x8_t u[kQuantBlocks];
    for (int b = 0; b < kQuantBlocks; ++b) {
      u[b] = vld1q_u16(source(b));
      s[b] = vreinterpretq_s16_u16(u[b]);
      for (int i = 8; i < QK4_0; i += 8) {
        const uint16x8_t x = vld1q_u16(source(b) + i);
        u[b] = vmaxq_u16(u[b], x);
        s[b] = vmaxq_s16(s[b], vreinterpretq_s16_u16(x));
      }
    }
    for (int n = kQuantBlocks / 2; n > 0; n /= 2)
      for (int b = 0; b < n; ++b) {
        s[b] = vpmaxq_s16(s[2 * b], s[2 * b + 1]);
        u[b] = vpmaxq_u16(u[2 * b], u[2 * b + 1]);
      }
    const float16x8_t of_s = vreinterpretq_f16_s16(s[0]), of_u = vreinterpretq_f16_u16(u[0]);
    top[0] = vcvt_f32_f16(vget_low_f16(of_s));
    top[1] = vcvt_f32_f16(vget_high_f16(of_s));
    bottom[0] = vcvt_f32_f16(vget_low_f16(of_u));
    bottom[1] = vcvt_f32_f16(vget_high_f16(of_u));
  }
}

/// 32 values y >= 0 become min(15, trunc(y)), packed.
MIXEDKV_INLINE void store_q4(uint8_t *qs, const f32v *y) {
  uint8x8_t bytes[4];
  for (int i = 0; i < 4; ++i) {
    const uint16x4_t a = vmovn_u32(vcvtq_u32_f32(y[2 * i]));
    const uint16x4_t b = vmovn_u32(vcvtq_u32_f32(y[2 * i + 1]));
    bytes[i] = vmin_u8(vmovn_u16(vcombine_u16(a, b)), vdup_n_u8(15));
  }
  vst1_u8(qs, vsli_n_u8(bytes[0], bytes[2], 4));
  vst1_u8(qs + 8, vsli_n_u8(bytes[1], bytes[3], 4));
}

MIXEDKV_INLINE f16_t to_half(float x) {
  return vget_lane_u16(vreinterpret_u16_f16(vcvt_f16_f32(vdupq_n_f32(x))), 0);
}

// --- tiles: 32 registers hold 4 x 4 sums beside four keys and their unpacking ------------------

constexpr int kRows = 4;
constexpr int kOpenKeys = 1;
constexpr int key_tile(int rows, bool) { return rows == 1 ? 8 : 4; }
constexpr int value_tile(int rows, bool) { return rows <= 2 ? 8 : 4; }

MIXEDKV_INLINE void transpose(f32v (&x)[4]) {
  const float32x4x2_t a = vtrnq_f32(x[0], x[1]), b = vtrnq_f32(x[2], x[3]);
  x[0] = vcombine_f32(vget_low_f32(a.val[0]), vget_low_f32(b.val[0]));
  x[1] = vcombine_f32(vget_low_f32(a.val[1]), vget_low_f32(b.val[1]));
  x[2] = vcombine_f32(vget_high_f32(a.val[0]), vget_high_f32(b.val[0]));
  x[3] = vcombine_f32(vget_high_f32(a.val[1]), vget_high_f32(b.val[1]));
}
