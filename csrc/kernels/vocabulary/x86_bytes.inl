// Sixteen bytes at a time for q4_0_tiles.inl, in 128-bit instructions of x86; meanings of the
// words: vocabulary/common.h.

using b16 = __m128i;

MIXEDKV_INLINE b16 load_b16(const void *p) {
  return _mm_loadu_si128(static_cast<const __m128i *>(p));
}
MIXEDKV_INLINE void store_b16(void *p, b16 x) { _mm_storeu_si128(static_cast<__m128i *>(p), x); }
MIXEDKV_INLINE b16 set1_b16(uint8_t x) { return _mm_set1_epi8(static_cast<char>(x)); }
MIXEDKV_INLINE b16 set1_words_b16(uint32_t x) { return _mm_set1_epi32(static_cast<int>(x)); }
MIXEDKV_INLINE b16 b16_of(uint64_t low, uint64_t high) {
  return _mm_set_epi64x(static_cast<long long>(high), static_cast<long long>(low));
}
MIXEDKV_INLINE b16 and_b16(b16 a, b16 b) { return _mm_and_si128(a, b); }
MIXEDKV_INLINE b16 or_b16(b16 a, b16 b) { return _mm_or_si128(a, b); }
MIXEDKV_INLINE b16 xor_b16(b16 a, b16 b) { return _mm_xor_si128(a, b); }

// The masks make up for shifts of bytes, which there are none of.
MIXEDKV_INLINE b16 low_nibbles_of(b16 a, b16 b) {
  const b16 low = set1_b16(15);
  return or_b16(and_b16(a, low), _mm_slli_epi16(and_b16(b, low), 4));
}
MIXEDKV_INLINE b16 high_nibbles_of(b16 a, b16 b) {
  const b16 high = set1_b16(0xf0);
  return or_b16(_mm_srli_epi16(and_b16(a, high), 4), and_b16(b, high));
}

MIXEDKV_INLINE void interleave_b16(b16 (&x)[4]) {
  const b16 a = _mm_unpacklo_epi8(x[0], x[1]), b = _mm_unpackhi_epi8(x[0], x[1]);
  const b16 c = _mm_unpacklo_epi8(x[2], x[3]), d = _mm_unpackhi_epi8(x[2], x[3]);
  x[0] = _mm_unpacklo_epi16(a, c);
  x[1] = _mm_unpackhi_epi16(a, c);
  x[2] = _mm_unpacklo_epi16(b, d);
  x[3] = _mm_unpackhi_epi16(b, d);
}

MIXEDKV_INLINE void transpose_words_b16(b16 (&x)[4]) {
  const b16 a = _mm_unpacklo_epi32(x[0], x[1]), b = _mm_unpackhi_epi32(x[0], x[1]);
  const b16 c = _mm_unpacklo_epi32(x[2], x[3]), d = _mm_unpackhi_epi32(x[2], x[3]);
  x[0] = _mm_unpacklo_epi64(a, c);
  x[1] = _mm_unpackhi_epi64(a, c);
  x[2] = _mm_unpacklo_epi64(b, d);
  x[3] = _mm_unpackhi_epi64(b, d);
}
