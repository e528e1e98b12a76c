// Sixteen bytes at a time for q4_0_tiles.inl, in Advanced SIMD; meanings of the words:
// vocabulary/common.h.

using b16 = uint8x16_t;

MIXEDKV_INLINE b16 load_b16(const void *p) { return vld1q_u8(static_cast<const uint8_t *>(p)); }
MIXEDKV_INLINE void store_b16(void *p, b16 x) { vst1q_u8(static_cast<uint8_t *>(p), x); }
MIXEDKV_INLINE b16 set1_b16(uint8_t x) { return vdupq_n_u8(x); }
MIXEDKV_INLINE b16 set1_words_b16(uint32_t x) { return vreinterpretq_u8_u32(vdupq_n_u32(x)); }
MIXEDKV_INLINE b16 b16_of(uint64_t low, uint64_t high) {
  return vcombine_u8(vcreate_u8(low), vcreate_u8(high));
}
MIXEDKV_INLINE b16 and_b16(b16 a, b16 b) { return vandq_u8(a, b); }
MIXEDKV_INLINE b16 or_b16(b16 a, b16 b) { return vorrq_u8(a, b); }
MIXEDKV_INLINE b16 xor_b16(b16 a, b16 b) { return veorq_u8(a, b); }

MIXEDKV_INLINE b16 low_nibbles_of(b16 a, b16 b) { return vsliq_n_u8(a, b, 4); }
MIXEDKV_INLINE b16 high_nibbles_of(b16 a, b16 b) { return vsriq_n_u8(b, a, 4); }

MIXEDKV_INLINE void interleave_b16(b16 (&x)[4]) {
  const uint8x16x2_t a = vzipq_u8(x[0], x[1]), b = vzipq_u8(x[2], x[3]);
  for (int i = 0; i < 2; ++i) {
    const uint16x8x2_t words =
        vzipq_u16(vreinterpretq_u16_u8(a.val[i]), vreinterpretq_u16_u8(b.val[i]));
    x[2 * i] = vreinterpretq_u8_u16(words.val[0]);
    x[2 * i + 1] = vreinterpretq_u8_u16(words.val[1]);
  }
}

MIXEDKV_INLINE void transpose_words_b16(b16 (&x)[4]) {
  uint32x4_t y[4];
  for (int i = 0; i < 4; ++i)
    y[i] = vreinterpretq_u32_u8(x[i]);
  const uint32x4x2_t a = vtrnq_u32(y[0], y[1]), b = vtrnq_u32(y[2], y[3]);
  x[0] = vreinterpretq_u8_u32(vcombine_u32(vget_low_u32(a.val[0]), vget_low_u32(b.val[0])));
  x[1] = vreinterpretq_u8_u32(vcombine_u32(vget_low_u32(a.val[1]), vget_low_u32(b.val[1])));
  x[2] = vreinterpretq_u8_u32(vcombine_u32(vget_high_u32(a.val[0]), vget_high_u32(b.val[0])));
  x[3] = vreinterpretq_u8_u32(vcombine_u32(vget_high_u32(a.val[1]), vget_high_u32(b.val[1])));
}
