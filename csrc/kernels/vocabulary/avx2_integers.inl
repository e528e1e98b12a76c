// Integer vocabulary of AVX2 for tile_keys.inl; meanings of the words: vocabulary/common.h. A file
// that is compiled for AVX-VNNI defines MIXEDKV_VNNI first.

using i32v = __m256i;
constexpr int kPackedVectors = 1; // 16 registers: a block's nibbles take eight,
constexpr int kValueVectors = 1;  // and four rows' two sums too
constexpr int kWeightBlocks = 2;

MIXEDKV_INLINE i32v load_i32(const void *p) {
  return _mm256_loadu_si256(static_cast<const __m256i *>(p));
}
MIXEDKV_INLINE i32v set1_i32(int32_t x) { return _mm256_set1_epi32(x); }
MIXEDKV_INLINE i32v zero_i32() { return _mm256_setzero_si256(); }
MIXEDKV_INLINE i32v add_i32(i32v a, i32v b) { return _mm256_add_epi32(a, b); }
MIXEDKV_INLINE i32v sub_i32(i32v a, i32v b) { return _mm256_sub_epi32(a, b); }
MIXEDKV_INLINE i32v and_i32(i32v a, i32v b) { return _mm256_and_si256(a, b); }
MIXEDKV_INLINE i32v xor_i32(i32v a, i32v b) { return _mm256_xor_si256(a, b); }
template <int N> MIXEDKV_INLINE i32v shift_left(i32v x) { return _mm256_slli_epi32(x, N); }
template <int N> MIXEDKV_INLINE i32v shift_right_signed(i32v x) { return _mm256_srai_epi32(x, N); }
MIXEDKV_INLINE f32v to_f32(i32v x) { return _mm256_cvtepi32_ps(x); }
MIXEDKV_INLINE f32v bits_as_f32(i32v x) { return _mm256_castsi256_ps(x); }
MIXEDKV_INLINE i32v f32_as_bits(f32v x) { return _mm256_castps_si256(x); }

MIXEDKV_INLINE i32v low_nibbles(i32v x) { return _mm256_and_si256(x, _mm256_set1_epi8(15)); }
MIXEDKV_INLINE i32v high_nibbles(i32v x) { return low_nibbles(_mm256_srli_epi16(x, 4)); }

MIXEDKV_INLINE i32v load_table(const uint8_t *bytes) {
  return _mm256_broadcastsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i *>(bytes)));
}
MIXEDKV_INLINE i32v look_up(i32v table, i32v x) { return _mm256_shuffle_epi8(table, x); }

#if defined(MIXEDKV_VNNI)
constexpr bool kByteDots = true;
#else
constexpr bool kByteDots = false;
#endif
constexpr bool kSignedDots = false;

using Dot = __m256i;
#if defined(MIXEDKV_VNNI)
MIXEDKV_INLINE Dot dot_from(i32v start) { return start; }
MIXEDKV_INLINE Dot dot(Dot acc, i32v u, i32v s) { return _mm256_dpbusd_avx_epi32(acc, u, s); }
MIXEDKV_INLINE i32v dot_total(Dot acc, i32v) { return acc; }
MIXEDKV_INLINE i32v madd16(i32v acc, i32v a, i32v b) { return _mm256_dpwssd_avx_epi32(acc, a, b); }
#else
// 16-bit sums: 8 words of 2 products of 15 and 127 at most stay below 2^15.
MIXEDKV_INLINE Dot dot_from(i32v) { return zero_i32(); }
MIXEDKV_INLINE Dot dot(Dot acc, i32v u, i32v s) {
  return _mm256_add_epi16(acc, _mm256_maddubs_epi16(u, s));
}
MIXEDKV_INLINE i32v dot_total(Dot acc, i32v start) {
  return add_i32(start, _mm256_madd_epi16(acc, _mm256_set1_epi16(1)));
}
MIXEDKV_INLINE i32v madd16(i32v acc, i32v a, i32v b) {
  return _mm256_add_epi32(acc, _mm256_madd_epi16(a, b));
}
#endif

MIXEDKV_INLINE i32v high_bytes(i32v x) { return _mm256_srli_epi16(x, 8); }

MIXEDKV_INLINE i32v to_i32(f32v x) { return _mm256_cvtps_epi32(x); }
MIXEDKV_INLINE void store_halves(int16_t *p, i32v x) {
  _mm_storeu_si128(reinterpret_cast<__m128i *>(p),
                   _mm_packs_epi32(_mm256_castsi256_si128(x), _mm256_extracti128_si256(x, 1)));
}
MIXEDKV_INLINE void store_bytes(int8_t *p, i32v x) {
  const __m128i halves = _mm_packs_epi32(_mm256_castsi256_si128(x), _mm256_extracti128_si256(x, 1));
  _mm_storel_epi64(reinterpret_cast<__m128i *>(p), _mm_packs_epi16(halves, halves));
}
MIXEDKV_INLINE int32_t sum_lanes(i32v x) {
  __m128i sum = _mm_add_epi32(_mm256_castsi256_si128(x), _mm256_extracti128_si256(x, 1));
  sum = _mm_add_epi32(sum, _mm_shuffle_epi32(sum, 0x4e));
  return _mm_cvtsi128_si32(_mm_add_epi32(sum, _mm_shuffle_epi32(sum, 0xb1)));
}

/// Bits of a where mask has them, of b elsewhere.
MIXEDKV_INLINE i32v merge_i32(i32v mask, i32v a, i32v b) {
  return _mm256_or_si256(_mm256_and_si256(mask, a), _mm256_andnot_si256(mask, b));
}
MIXEDKV_INLINE void store_i32(void *p, i32v x) {
  _mm256_storeu_si256(static_cast<__m256i *>(p), x);
}
MIXEDKV_INLINE i32v set1_halves(int x) { return _mm256_set1_epi16(static_cast<short>(x)); }
MIXEDKV_INLINE i32v scale_halves(i32v x, i32v m) { return _mm256_mulhrs_epi16(x, m); }
MIXEDKV_INLINE i32v narrow(i32v a, i32v b) { return _mm256_packs_epi16(a, b); }
MIXEDKV_INLINE i32v widen_low(i32v x) { return _mm256_srai_epi16(_mm256_unpacklo_epi8(x, x), 8); }
MIXEDKV_INLINE i32v widen_high(i32v x) { return _mm256_srai_epi16(_mm256_unpackhi_epi8(x, x), 8); }
MIXEDKV_INLINE i32v count_above(i32v n, i32v x, i32v y) {
  return _mm256_sub_epi8(n, _mm256_cmpgt_epi8(x, y));
}

using h16v = __m128i;
MIXEDKV_INLINE h16v zero_half_bits() { return _mm_setzero_si128(); }
MIXEDKV_INLINE h16v max_magnitude_bits(h16v a, const f16_t *p) {
  const __m128i x = _mm_loadu_si128(reinterpret_cast<const __m128i *>(p));
  return _mm_max_epu16(a, _mm_and_si128(x, _mm_set1_epi16(0x7fff)));
}
MIXEDKV_INLINE bool any_bits_above(h16v a, int32_t limit) {
  const __m128i above = _mm_cmpgt_epi16(a, _mm_set1_epi16(static_cast<int16_t>(limit)));
  return _mm_movemask_epi8(above) != 0;
}

MIXEDKV_INLINE void prefetch(const void *p) {
  _mm_prefetch(static_cast<const char *>(p), _MM_HINT_T0);
}
