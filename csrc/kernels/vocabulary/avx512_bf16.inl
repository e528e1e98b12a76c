// Vocabulary of AVX512_BF16 for bf16.inl; meanings of the words stand there.

constexpr int kProductRows = 6;
constexpr int kProductPanels = 4;

// Compilers differ in what __m512bh is, and in how it may be cast: it is copied.
MIXEDKV_INLINE __m512bh as_pairs(i32v x) {
  __m512bh y;
  memcpy(&y, &x, sizeof y);
  return y;
}

MIXEDKV_INLINE i32v round_side_by_side(f32v a, f32v b) {
  const __m512bh pairs = _mm512_cvtne2ps_pbh(b, a);
  i32v y;
  memcpy(&y, &pairs, sizeof y);
  return y;
}
MIXEDKV_INLINE i32v round_interleaved(f32v a, f32v b) {
  // Words 0 and 16, 1 and 17, ...
  const __m512i first = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
  const __m512i order =
      _mm512_or_si512(first, _mm512_slli_epi32(_mm512_add_epi32(first, _mm512_set1_epi32(16)), 16));
  return _mm512_permutexvar_epi16(order, round_side_by_side(a, b));
}
MIXEDKV_INLINE f32v add_pair_products(f32v sum, i32v a, i32v b) {
  return _mm512_dpbf16_ps(sum, as_pairs(a), as_pairs(b));
}
MIXEDKV_INLINE i32v pairs_of_ones() { return set1_i32(0x3f803f80); }
