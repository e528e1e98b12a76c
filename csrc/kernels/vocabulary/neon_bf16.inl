// Vocabulary of FEAT_BF16 for bf16.inl; meanings of the words stand there. bfdot rather than
// bfmmla: its operands and sums lie as those of AVX512_BF16 do.

constexpr int kProductRows = 4;
constexpr int kProductPanels = 1;

MIXEDKV_INLINE i32v round_side_by_side(f32v a, f32v b) {
  return vreinterpretq_s32_bf16(vcvtq_high_bf16_f32(vcvtq_low_bf16_f32(a), b));
}
MIXEDKV_INLINE i32v round_interleaved(f32v a, f32v b) {
  const uint16x8_t both = vreinterpretq_u16_s32(round_side_by_side(a, b));
  return vreinterpretq_s32_u16(vzip1q_u16(both, vextq_u16(both, both, 4)));
}
MIXEDKV_INLINE f32v add_pair_products(f32v sum, i32v a, i32v b) {
  return vbfdotq_f32(sum, vreinterpretq_bf16_s32(a), vreinterpretq_bf16_s32(b));
}
/// GCC 12 takes a constant vector of bf16 for one of halves, and makes it another number: the
/// constant is hidden from it.
MIXEDKV_INLINE i32v pairs_of_ones() {
  i32v ones = set1_i32(0x3f803f80);
#if defined(__GNUC__)
  __asm__("" : "+w"(ones));
#endif
  return ones;
}
