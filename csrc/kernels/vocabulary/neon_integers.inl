// Integer vocabulary of NEON for tile_keys.inl; meanings of the words: vocabulary/common.h. A file
// that is compiled for dot products defines MIXEDKV_DOTPROD first.

using i32v = int32x4_t;
constexpr int kPackedVectors = 2;
constexpr int kValueVectors = 2;
constexpr int kWeightBlocks = 4;

MIXEDKV_INLINE i32v load_i32(const void *p) {
  return vreinterpretq_s32_u8(vld1q_u8(static_cast<const uint8_t *>(p)));
}
MIXEDKV_INLINE i32v set1_i32(int32_t x) { return vdupq_n_s32(x); }
MIXEDKV_INLINE i32v zero_i32() { return vdupq_n_s32(0); }
MIXEDKV_INLINE i32v add_i32(i32v a, i32v b) { return vaddq_s32(a, b); }
MIXEDKV_INLINE i32v sub_i32(i32v a, i32v b) { return vsubq_s32(a, b); }
MIXEDKV_INLINE i32v and_i32(i32v a, i32v b) { return vandq_s32(a, b); }
MIXEDKV_INLINE i32v xor_i32(i32v a, i32v b) { return veorq_s32(a, b); }
template <int N> MIXEDKV_INLINE i32v shift_left(i32v x) {
  return vshlq_s32(x, vdupq_n_s32(N)); // N = 0 has no immediate form on every compiler
}
template <int N> MIXEDKV_INLINE i32v shift_right_signed(i32v x) { return vshrq_n_s32(x, N); }
MIXEDKV_INLINE f32v to_f32(i32v x) { return vcvtq_f32_s32(x); }
MIXEDKV_INLINE f32v bits_as_f32(i32v x) { return vreinterpretq_f32_s32(x); }
MIXEDKV_INLINE i32v f32_as_bits(f32v x) { return vreinterpretq_s32_f32(x); }

MIXEDKV_INLINE i32v low_nibbles(i32v x) {
  return vreinterpretq_s32_u8(vandq_u8(vreinterpretq_u8_s32(x), vdupq_n_u8(15)));
}
MIXEDKV_INLINE i32v high_nibbles(i32v x) {
  return vreinterpretq_s32_u8(vshrq_n_u8(vreinterpretq_u8_s32(x), 4));
}

MIXEDKV_INLINE i32v load_table(const uint8_t *bytes) {
  return vreinterpretq_s32_u8(vld1q_u8(bytes));
}
MIXEDKV_INLINE i32v look_up(i32v table, i32v x) {
  return vreinterpretq_s32_u8(vqtbl1q_u8(vreinterpretq_u8_s32(table), vreinterpretq_u8_s32(x)));
}

constexpr bool kSignedDots = true;
#if defined(MIXEDKV_DOTPROD)
constexpr bool kByteDots = true;
using Dot = int32x4_t;
MIXEDKV_INLINE Dot dot_from(i32v start) { return start; }
MIXEDKV_INLINE Dot dot(Dot acc, i32v u, i32v s) {
  return vdotq_s32(acc, vreinterpretq_s8_s32(u), vreinterpretq_s8_s32(s));
}
MIXEDKV_INLINE i32v dot_total(Dot acc, i32v) { return acc; }
#else
constexpr bool kByteDots = false;
/// 16-bit sums, of the first two tokens and of the last two: 8 products of 15 and 127 each.
struct Dot {
  int16x8_t low, high;
};
MIXEDKV_INLINE Dot dot_from(i32v) { return {vdupq_n_s16(0), vdupq_n_s16(0)}; }
MIXEDKV_INLINE Dot dot(Dot acc, i32v u, i32v s) {
  const int8x16_t a = vreinterpretq_s8_s32(u);
  const int8x16_t b = vreinterpretq_s8_s32(s);
  return {vmlal_s8(acc.low, vget_low_s8(a), vget_low_s8(b)), vmlal_high_s8(acc.high, a, b)};
}
MIXEDKV_INLINE i32v dot_total(Dot acc, i32v start) {
  return vaddq_s32(start, vpaddq_s32(vpaddlq_s16(acc.low), vpaddlq_s16(acc.high)));
}
#endif

MIXEDKV_INLINE i32v madd16(i32v acc, i32v a, i32v b) {
  const int16x8_t x = vreinterpretq_s16_s32(a);
  const int16x8_t y = vreinterpretq_s16_s32(b);
  return vaddq_s32(acc,
                   vpaddq_s32(vmull_s16(vget_low_s16(x), vget_low_s16(y)), vmull_high_s16(x, y)));
}

MIXEDKV_INLINE i32v high_bytes(i32v x) {
  return vreinterpretq_s32_u16(vshrq_n_u16(vreinterpretq_u16_s32(x), 8));
}

MIXEDKV_INLINE i32v to_i32(f32v x) { return vcvtnq_s32_f32(x); }
MIXEDKV_INLINE void store_halves(int16_t *p, i32v x) { vst1_s16(p, vqmovn_s32(x)); }
MIXEDKV_INLINE void store_bytes(int8_t *p, i32v x) {
  const int16x4_t halves = vqmovn_s32(x);
  const int8x8_t bytes = vqmovn_s16(vcombine_s16(halves, halves));
  const int32_t word = vget_lane_s32(vreinterpret_s32_s8(bytes), 0);
  memcpy(p, &word, sizeof word);
}
MIXEDKV_INLINE int32_t sum_lanes(i32v x) { return vaddvq_s32(x); }

/// Bits of a where mask has them, of b elsewhere.
MIXEDKV_INLINE i32v merge_i32(i32v mask, i32v a, i32v b) {
  return vbslq_s32(vreinterpretq_u32_s32(mask), a, b);
}
MIXEDKV_INLINE void store_i32(void *p, i32v x) {
  vst1q_u8(static_cast<uint8_t *>(p), vreinterpretq_u8_s32(x));
}
MIXEDKV_INLINE i32v set1_halves(int x) {
  return vreinterpretq_s32_s16(vdupq_n_s16(static_cast<int16_t>(x)));
}
MIXEDKV_INLINE i32v scale_halves(i32v x, i32v m) {
  return vreinterpretq_s32_s16(vqrdmulhq_s16(vreinterpretq_s16_s32(x), vreinterpretq_s16_s32(m)));
}
MIXEDKV_INLINE i32v narrow(i32v a, i32v b) {
  return vreinterpretq_s32_s8(
      vcombine_s8(vqmovn_s16(vreinterpretq_s16_s32(a)), vqmovn_s16(vreinterpretq_s16_s32(b))));
}
MIXEDKV_INLINE i32v widen_low(i32v x) {
  return vreinterpretq_s32_s16(vmovl_s8(vget_low_s8(vreinterpretq_s8_s32(x))));
}
MIXEDKV_INLINE i32v widen_high(i32v x) {
  return vreinterpretq_s32_s16(vmovl_high_s8(vreinterpretq_s8_s32(x)));
}
MIXEDKV_INLINE i32v count_above(i32v n, i32v x, i32v y) {
  const uint8x16_t above = vcgtq_s8(vreinterpretq_s8_s32(x), vreinterpretq_s8_s32(y));
  return vreinterpretq_s32_u8(vsubq_u8(vreinterpretq_u8_s32(n), above));
}

using h16v = uint16x4_t;
MIXEDKV_INLINE h16v zero_half_bits() { return vdup_n_u16(0); }
MIXEDKV_INLINE h16v max_magnitude_bits(h16v a, const f16_t *p) {
  uint16x4_t x;
  memcpy(&x, p, sizeof x);
  return vmax_u16(a, vand_u16(x, vdup_n_u16(0x7fff)));
}
MIXEDKV_INLINE bool any_bits_above(h16v a, int32_t limit) { return vmaxv_u16(a) > limit; }

MIXEDKV_INLINE void prefetch(const void *p) { __builtin_prefetch(p); }
