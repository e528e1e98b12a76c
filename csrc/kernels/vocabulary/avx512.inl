// Vector vocabulary of AVX-512 (F, BW, DQ, VL): 16 lanes, 32 registers, masks for every tail.
// Meanings of the words: vocabulary/common.h.

constexpr int kLanes = 16;
using f32v = __m512;

MIXEDKV_INLINE __mmask16 first_lanes(int n) { return static_cast<__mmask16>((1u << n) - 1u); }

MIXEDKV_INLINE f32v zero() { return _mm512_setzero_ps(); }
MIXEDKV_INLINE f32v set1(float x) { return _mm512_set1_ps(x); }
MIXEDKV_INLINE f32v load(const float *p) { return _mm512_loadu_ps(p); }
MIXEDKV_INLINE f32v load(const f16_t *p) {
  return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i *>(p)));
}
MIXEDKV_INLINE f32v load_n(const float *p, int n, float fill = 0.0f) {
  return _mm512_mask_loadu_ps(set1(fill), first_lanes(n), p);
}
MIXEDKV_INLINE f32v load_n(const f16_t *p, int n) {
  return _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(first_lanes(n), p));
}
MIXEDKV_INLINE f32v from_bf16(__m256i x) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(x), 16));
}
MIXEDKV_INLINE f32v load(const bf16_t *p) {
  return from_bf16(_mm256_loadu_si256(reinterpret_cast<const __m256i *>(p)));
}
MIXEDKV_INLINE f32v load_n(const bf16_t *p, int n) {
  return from_bf16(_mm256_maskz_loadu_epi16(first_lanes(n), p));
}
MIXEDKV_INLINE f32v load(const int8_t *p) {
  const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i *>(p));
  return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(bytes));
}
MIXEDKV_INLINE f32v set1_half(f16_t x) {
  return _mm512_cvtph_ps(_mm256_set1_epi16(static_cast<short>(x)));
}
MIXEDKV_INLINE void store(float *p, f32v x) { _mm512_storeu_ps(p, x); }
MIXEDKV_INLINE void store_n(float *p, f32v x, int n) {
  _mm512_mask_storeu_ps(p, first_lanes(n), x);
}
MIXEDKV_INLINE __m256i to_halves(f32v x) {
  return _mm512_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}
MIXEDKV_INLINE void store(f16_t *p, f32v x) {
  _mm256_storeu_si256(reinterpret_cast<__m256i *>(p), to_halves(x));
}
MIXEDKV_INLINE void store_n(f16_t *p, f32v x, int n) {
  _mm256_mask_storeu_epi16(p, first_lanes(n), to_halves(x));
}

MIXEDKV_INLINE f32v add(f32v a, f32v b) { return _mm512_add_ps(a, b); }
MIXEDKV_INLINE f32v sub(f32v a, f32v b) { return _mm512_sub_ps(a, b); }
MIXEDKV_INLINE f32v mul(f32v a, f32v b) { return _mm512_mul_ps(a, b); }
MIXEDKV_INLINE f32v div(f32v a, f32v b) { return _mm512_div_ps(a, b); }
MIXEDKV_INLINE f32v fma(f32v a, f32v b, f32v c) { return _mm512_fmadd_ps(a, b, c); }
MIXEDKV_INLINE f32v rint(f32v x) {
  return _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}
MIXEDKV_INLINE f32v scale_by_power(f32v x, f32v n) { return _mm512_scalef_ps(x, n); }
MIXEDKV_INLINE f32v max_or_second(f32v a, f32v b) { return _mm512_max_ps(a, b); }
MIXEDKV_INLINE f32v min_or_second(f32v a, f32v b) { return _mm512_min_ps(a, b); }
MIXEDKV_INLINE f32v max_bits(f32v a, f32v b) {
  return _mm512_castsi512_ps(_mm512_max_epu32(_mm512_castps_si512(a), _mm512_castps_si512(b)));
}
MIXEDKV_INLINE f32v select_below(f32v x, f32v y, f32v a, f32v b) {
  return _mm512_mask_blend_ps(_mm512_cmp_ps_mask(x, y, _CMP_LT_OQ), b, a);
}
MIXEDKV_INLINE bool any_below(f32v x, f32v y) { return _mm512_cmp_ps_mask(x, y, _CMP_LT_OQ) != 0; }
MIXEDKV_INLINE f32v abs_of(f32v x) { return _mm512_andnot_ps(set1(-0.0f), x); }
MIXEDKV_INLINE f32v copy_sign(f32v a, f32v s) {
  return _mm512_or_ps(abs_of(a), _mm512_and_ps(set1(-0.0f), s));
}

template <int H> MIXEDKV_INLINE f32v swap_lanes(f32v x) {
  if constexpr (H < 4)
    return _mm512_permute_ps(x, H == 1 ? 0xb1 : 0x4e);
  else
    return _mm512_shuffle_f32x4(x, x, H == 4 ? 0xb1 : 0x4e);
}

/// Lane k of the result is the sum of the lanes of the k-th vector.
MIXEDKV_INLINE __m128 sums4(f32v a, f32v b, f32v c, f32v d) {
  const f32v ab = add(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b));
  const f32v cd = add(_mm512_unpacklo_ps(c, d), _mm512_unpackhi_ps(c, d));
  const f32v abcd = add(_mm512_shuffle_ps(ab, cd, 0x44), _mm512_shuffle_ps(ab, cd, 0xee));
  const __m256 halves =
      _mm256_add_ps(_mm512_castps512_ps256(abcd), _mm512_extractf32x8_ps(abcd, 1));
  return _mm_add_ps(_mm256_castps256_ps128(halves), _mm256_extractf128_ps(halves, 1));
}
MIXEDKV_INLINE void sum4(float *out, f32v a, f32v b, f32v c, f32v d) {
  _mm_storeu_ps(out, sums4(a, b, c, d));
}
MIXEDKV_INLINE float sum_lanes(f32v x) { return _mm_cvtss_f32(sums4(x, x, x, x)); }
MIXEDKV_INLINE float max_lanes(f32v x) {
  const __m256 a = _mm256_max_ps(_mm512_castps512_ps256(x), _mm512_extractf32x8_ps(x, 1));
  const __m128 b = _mm_max_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
  const __m128 c = _mm_max_ps(b, _mm_movehl_ps(b, b));
  return _mm_cvtss_f32(_mm_max_ss(c, _mm_shuffle_ps(c, c, 1)));
}

MIXEDKV_INLINE bool any_not_finite(f32v x) {
  const __m512i exponent = _mm512_set1_epi32(0x7f800000);
  const __m512i bits = _mm512_and_si512(_mm512_castps_si512(x), exponent);
  return _mm512_cmpeq_epi32_mask(bits, exponent) != 0;
}
MIXEDKV_INLINE bool any_not_finite_16(const f16_t *p) {
  const __m256i exponent = _mm256_set1_epi16(0x7c00);
  const __m256i bits =
      _mm256_and_si256(_mm256_loadu_si256(reinterpret_cast<const __m256i *>(p)), exponent);
  return _mm256_cmpeq_epi16_mask(bits, exponent) != 0;
}

// --- Q4_0: sixteen possible values of a block fit one register, so that a nibble is looked up
// rather than computed. vpermps reads the low four bits of an index and ignores the others: the
// low nibbles need no masking, the high ones a shift. ----------------------------------------

struct Q4 {
  __m512 values;
  __m512i nibbles;
};
MIXEDKV_INLINE Q4 q4_open(const block_q4_0 *block) {
  const __m512 minus8 = _mm512_setr_ps(-8, -7, -6, -5, -4, -3, -2, -1, 0, 1, 2, 3, 4, 5, 6, 7);
  const __m512 d = _mm512_cvtph_ps(_mm256_set1_epi16(static_cast<short>(block->d)));
  const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i *>(block->qs));
  return {_mm512_mul_ps(minus8, d), _mm512_cvtepu8_epi32(bytes)};
}
template <int V> MIXEDKV_INLINE f32v q4_vector(const Q4 &q4) {
  return _mm512_permutexvar_ps(V == 0 ? q4.nibbles : _mm512_srli_epi32(q4.nibbles, 4), q4.values);
}
template <int V> MIXEDKV_INLINE f32v q4_vector_exact(const Q4 &q4) { return q4_vector<V>(q4); }

/// Any sixteen levels are looked up in the same way.
using Levels = Q4;
MIXEDKV_INLINE Levels open_levels(const int8_t *levels, f16_t d, __m128i bytes) {
  return {_mm512_mul_ps(load(levels), set1_half(d)), _mm512_cvtepu8_epi32(bytes)};
}
template <int V> MIXEDKV_INLINE f32v level(const Levels &x) { return q4_vector<V>(x); }

/// Of 32 values: the bits of the largest as signed integers (negative where none has a clear sign
/// bit) and as unsigned ones (below 2^31 where none has a set one).
MIXEDKV_INLINE void find_extremes(const f32v *x, int32_t &largest_signed,
                                  uint32_t &largest_unsigned) {
  const __m512i a = _mm512_castps_si512(x[0]), b = _mm512_castps_si512(x[1]);
  const __m512i s = _mm512_max_epi32(a, b), u = _mm512_max_epu32(a, b);
  __m256i s8 = _mm256_max_epi32(_mm512_castsi512_si256(s), _mm512_extracti32x8_epi32(s, 1));
  __m256i u8 = _mm256_max_epu32(_mm512_castsi512_si256(u), _mm512_extracti32x8_epi32(u, 1));
  __m128i s4 = _mm_max_epi32(_mm256_castsi256_si128(s8), _mm256_extracti128_si256(s8, 1));
  __m128i u4 = _mm_max_epu32(_mm256_castsi256_si128(u8), _mm256_extracti128_si256(u8, 1));
  s4 = _mm_max_epi32(s4, _mm_shuffle_epi32(s4, 0x4e));
  u4 = _mm_max_epu32(u4, _mm_shuffle_epi32(u4, 0x4e));
  s4 = _mm_max_epi32(s4, _mm_shuffle_epi32(s4, 0xb1));
  u4 = _mm_max_epu32(u4, _mm_shuffle_epi32(u4, 0xb1));
  largest_signed = _mm_cvtsi128_si32(s4);
  largest_unsigned = static_cast<uint32_t>(_mm_cvtsi128_si32(u4));
}

/// Of kQuantBlocks blocks, the i-th of 32 values at source(i), what find_extremes finds: block i's
/// in lane i, as floats. Blocks are folded into one another, two to one, so that no step is spent
/// on a single one.
constexpr int kQuantBlocks = 16;
struct LargestSigned {
  __m512i of_32(__m512i a, __m512i b) const { return _mm512_max_epi32(a, b); }
  __m512i of_16(__m512i a, __m512i b) const { return _mm512_max_epi16(a, b); }
};
struct LargestUnsigned {
  __m512i of_32(__m512i a, __m512i b) const { return _mm512_max_epu32(a, b); }
  __m512i of_16(__m512i a, __m512i b) const { return _mm512_max_epu16(a, b); }
};
template <typename Op, typename F> MIXEDKV_INLINE f32v fold_blocks(Op op, F source, const float *) {
  __m512i fours[4];
  for (int i = 0; i < 4; ++i) {
    __m512i x[4];
    for (int j = 0; j < 4; ++j) {
      const float *p = source(4 * i + j);
      x[j] = op.of_32(_mm512_loadu_si512(p), _mm512_loadu_si512(p + kLanes));
    }
    const __m512i a =
        op.of_32(_mm512_unpacklo_epi32(x[0], x[1]), _mm512_unpackhi_epi32(x[0], x[1]));
    const __m512i b =
        op.of_32(_mm512_unpacklo_epi32(x[2], x[3]), _mm512_unpackhi_epi32(x[2], x[3]));
    fours[i] = op.of_32(_mm512_unpacklo_epi64(a, b), _mm512_unpackhi_epi64(a, b));
  }
  const __m512i a = op.of_32(_mm512_shuffle_i32x4(fours[0], fours[1], 0x88),
                             _mm512_shuffle_i32x4(fours[0], fours[1], 0xdd));
  const __m512i b = op.of_32(_mm512_shuffle_i32x4(fours[2], fours[3], 0x88),
                             _mm512_shuffle_i32x4(fours[2], fours[3], 0xdd));
  return _mm512_castsi512_ps(
      op.of_32(_mm512_shuffle_i32x4(a, b, 0x88), _mm512_shuffle_i32x4(a, b, 0xdd)));
}
template <typename Op, typename F> MIXEDKV_INLINE f32v fold_blocks(Op op, F source, const f16_t *) {
  __m512i eights[2];
  for (int i = 0; i < 2; ++i) {
    __m512i x[8];
    for (int j = 0; j < 8; ++j)
      x[j] = _mm512_loadu_si512(source(8 * i + j));
    for (int j = 0; j < 4; ++j)
      x[j] = op.of_16(_mm512_unpacklo_epi16(x[2 * j], x[2 * j + 1]),
                      _mm512_unpackhi_epi16(x[2 * j], x[2 * j + 1]));
    for (int j = 0; j < 2; ++j)
      x[j] = op.of_16(_mm512_unpacklo_epi32(x[2 * j], x[2 * j + 1]),
                      _mm512_unpackhi_epi32(x[2 * j], x[2 * j + 1]));
    eights[i] = op.of_16(_mm512_unpacklo_epi64(x[0], x[1]), _mm512_unpackhi_epi64(x[0], x[1]));
  }
  const __m512i both = op.of_16(_mm512_shuffle_i32x4(eights[0], eights[1], 0x88),
                                _mm512_shuffle_i32x4(eights[0], eights[1], 0xdd));
  const __m512i all = op.of_16(both, _mm512_shuffle_i32x4(both, both, 0xb1));
  return _mm512_cvtph_ps(_mm512_castsi512_si256(_mm512_shuffle_i32x4(all, all, 0x08)));
}
template <typename T, typename F>
MIXEDKV_INLINE void find_group_extremes(F source, f32v (&top)[1], f32v (&bottom)[1]) {
  const T *type = nullptr;
  top[0] = fold_blocks(LargestSigned(), source, type);
  bottom[0] = fold_blocks(LargestUnsigned(), source, type);
}

/// 32 values y >= 0 become min(15, trunc(y)), packed.
MIXEDKV_INLINE void store_q4(uint8_t *qs, const f32v *y) {
  const __m512i fifteen = _mm512_set1_epi32(15);
  const __m512i low = _mm512_min_epi32(_mm512_cvttps_epi32(y[0]), fifteen);
  const __m512i high = _mm512_min_epi32(_mm512_cvttps_epi32(y[1]), fifteen);
  const __m512i both = _mm512_or_si512(low, _mm512_slli_epi32(high, 4));
  _mm_storeu_si128(reinterpret_cast<__m128i *>(qs), _mm512_cvtepi32_epi8(both));
}

MIXEDKV_INLINE f16_t to_half(float x) {
  return static_cast<f16_t>(
      _mm_cvtsi128_si32(_mm_cvtps_ph(_mm_set_ss(x), _MM_FROUND_TO_NEAREST_INT)));
}

// --- tiles: 32 registers hold 16 to 24 sums beside the keys they are made from -----------------

constexpr int kRows = 6;
constexpr int kOpenKeys = 8;
constexpr int key_tile(int rows, bool q4) { return rows == 1 || (rows <= 3 && !q4) ? 8 : 4; }
constexpr int value_tile(int rows, bool) { return rows == 1 ? 16 : rows <= 3 ? 8 : 4; }

MIXEDKV_INLINE void transpose(f32v (&x)[16]) {
  f32v y[16];
  for (int i = 0; i < 16; i += 4) { // 4 x 4 in every 128-bit quarter
    const f32v a = _mm512_unpacklo_ps(x[i], x[i + 1]), b = _mm512_unpackhi_ps(x[i], x[i + 1]);
    const f32v c = _mm512_unpacklo_ps(x[i + 2], x[i + 3]);
    const f32v d = _mm512_unpackhi_ps(x[i + 2], x[i + 3]);
    y[i] = _mm512_shuffle_ps(a, c, 0x44);
    y[i + 1] = _mm512_shuffle_ps(a, c, 0xee);
    y[i + 2] = _mm512_shuffle_ps(b, d, 0x44);
    y[i + 3] = _mm512_shuffle_ps(b, d, 0xee);
  }
  for (int i = 0; i < 4; ++i) { // then the quarters, 4 x 4 again
    const f32v a = _mm512_shuffle_f32x4(y[i], y[i + 4], 0x44);
    const f32v b = _mm512_shuffle_f32x4(y[i], y[i + 4], 0xee);
    const f32v c = _mm512_shuffle_f32x4(y[i + 8], y[i + 12], 0x44);
    const f32v d = _mm512_shuffle_f32x4(y[i + 8], y[i + 12], 0xee);
    x[i] = _mm512_shuffle_f32x4(a, c, 0x88);
    x[i + 4] = _mm512_shuffle_f32x4(a, c, 0xdd);
    x[i + 8] = _mm512_shuffle_f32x4(b, d, 0x88);
    x[i + 12] = _mm512_shuffle_f32x4(b, d, 0xdd);
  }
}
