// Vector vocabulary of AVX2 with FMA and F16C: 8 lanes, 16 registers. Meanings of the words:
// vocabulary/common.h.

constexpr int kLanes = 8;
using f32v = __m256;

MIXEDKV_INLINE __m256i first_lanes(int n) {
  return _mm256_cmpgt_epi32(_mm256_set1_epi32(n), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}

MIXEDKV_INLINE f32v zero() { return _mm256_setzero_ps(); }
MIXEDKV_INLINE f32v set1(float x) { return _mm256_set1_ps(x); }
MIXEDKV_INLINE f32v load(const float *p) { return _mm256_loadu_ps(p); }
MIXEDKV_INLINE f32v load(const f16_t *p) {
  return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i *>(p)));
}
MIXEDKV_INLINE f32v load_n(const float *p, int n, float fill = 0.0f) {
  const __m256i mask = first_lanes(n);
  return _mm256_blendv_ps(set1(fill), _mm256_maskload_ps(p, mask), _mm256_castsi256_ps(mask));
}
MIXEDKV_INLINE f32v load_n(const f16_t *p, int n) {
  f16_t buffer[kLanes] = {0, 0, 0, 0, 0, 0, 0, 0};
  memcpy(buffer, p, static_cast<size_t>(n) * sizeof(f16_t));
  return load(buffer);
}
MIXEDKV_INLINE f32v load(const bf16_t *p) {
  const __m128i halves = _mm_loadu_si128(reinterpret_cast<const __m128i *>(p));
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(halves), 16));
}
MIXEDKV_INLINE f32v load_n(const bf16_t *p, int n) {
  bf16_t buffer[kLanes] = {};
  memcpy(buffer, p, static_cast<size_t>(n) * sizeof(bf16_t));
  return load(buffer);
}
MIXEDKV_INLINE f32v load(const int8_t *p) {
  const __m128i bytes = _mm_loadl_epi64(reinterpret_cast<const __m128i *>(p));
  return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(bytes));
}
MIXEDKV_INLINE f32v set1_half(f16_t x) {
  return _mm256_broadcastss_ps(_mm_cvtph_ps(_mm_cvtsi32_si128(x)));
}
MIXEDKV_INLINE void store(float *p, f32v x) { _mm256_storeu_ps(p, x); }
MIXEDKV_INLINE void store_n(float *p, f32v x, int n) { _mm256_maskstore_ps(p, first_lanes(n), x); }
MIXEDKV_INLINE void store(f16_t *p, f32v x) {
  _mm_storeu_si128(reinterpret_cast<__m128i *>(p), _mm256_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT));
}
MIXEDKV_INLINE void store_n(f16_t *p, f32v x, int n) {
  f16_t buffer[kLanes];
  store(buffer, x);
  memcpy(p, buffer, static_cast<size_t>(n) * sizeof(f16_t));
}

MIXEDKV_INLINE f32v add(f32v a, f32v b) { return _mm256_add_ps(a, b); }
MIXEDKV_INLINE f32v sub(f32v a, f32v b) { return _mm256_sub_ps(a, b); }
MIXEDKV_INLINE f32v mul(f32v a, f32v b) { return _mm256_mul_ps(a, b); }
MIXEDKV_INLINE f32v div(f32v a, f32v b) { return _mm256_div_ps(a, b); }
MIXEDKV_INLINE f32v fma(f32v a, f32v b, f32v c) { return _mm256_fmadd_ps(a, b, c); }
MIXEDKV_INLINE f32v rint(f32v x) {
  return _mm256_round_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}
/// x in [0.5, 2], n an integer in [-126, 127]: added to the exponent.
MIXEDKV_INLINE f32v scale_by_power(f32v x, f32v n) {
  const __m256i exponent = _mm256_slli_epi32(_mm256_cvtps_epi32(n), 23);
  return _mm256_castsi256_ps(_mm256_add_epi32(_mm256_castps_si256(x), exponent));
}
MIXEDKV_INLINE f32v max_or_second(f32v a, f32v b) { return _mm256_max_ps(a, b); }
MIXEDKV_INLINE f32v min_or_second(f32v a, f32v b) { return _mm256_min_ps(a, b); }
MIXEDKV_INLINE f32v max_bits(f32v a, f32v b) {
  return _mm256_castsi256_ps(_mm256_max_epu32(_mm256_castps_si256(a), _mm256_castps_si256(b)));
}
MIXEDKV_INLINE f32v select_below(f32v x, f32v y, f32v a, f32v b) {
  return _mm256_blendv_ps(b, a, _mm256_cmp_ps(x, y, _CMP_LT_OQ));
}
MIXEDKV_INLINE bool any_below(f32v x, f32v y) {
  return _mm256_movemask_ps(_mm256_cmp_ps(x, y, _CMP_LT_OQ)) != 0;
}
MIXEDKV_INLINE f32v abs_of(f32v x) { return _mm256_andnot_ps(set1(-0.0f), x); }
MIXEDKV_INLINE f32v copy_sign(f32v a, f32v s) {
  return _mm256_or_ps(abs_of(a), _mm256_and_ps(set1(-0.0f), s));
}

template <int H> MIXEDKV_INLINE f32v swap_lanes(f32v x) {
  if constexpr (H < 4)
    return _mm256_permute_ps(x, H == 1 ? 0xb1 : 0x4e);
  else
    return _mm256_permute2f128_ps(x, x, 1);
}

/// Lane k of the result is the sum of the lanes of the k-th vector. unpack and shuffle instead of
/// vhaddps, which is three operations everywhere.
MIXEDKV_INLINE __m128 sums4(f32v a, f32v b, f32v c, f32v d) {
  const f32v ab = add(_mm256_unpacklo_ps(a, b), _mm256_unpackhi_ps(a, b));
  const f32v cd = add(_mm256_unpacklo_ps(c, d), _mm256_unpackhi_ps(c, d));
  const f32v abcd = add(_mm256_shuffle_ps(ab, cd, 0x44), _mm256_shuffle_ps(ab, cd, 0xee));
  return _mm_add_ps(_mm256_castps256_ps128(abcd), _mm256_extractf128_ps(abcd, 1));
}
MIXEDKV_INLINE void sum4(float *out, f32v a, f32v b, f32v c, f32v d) {
  _mm_storeu_ps(out, sums4(a, b, c, d));
}
MIXEDKV_INLINE float sum_lanes(f32v x) { return _mm_cvtss_f32(sums4(x, x, x, x)); }
MIXEDKV_INLINE float max_lanes(f32v x) {
  const __m128 b = _mm_max_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
  const __m128 c = _mm_max_ps(b, _mm_movehl_ps(b, b));
  return _mm_cvtss_f32(_mm_max_ss(c, _mm_shuffle_ps(c, c, 1)));
}

MIXEDKV_INLINE bool any_not_finite(f32v x) {
  const __m256i exponent = _mm256_set1_epi32(0x7f800000);
  const __m256i bits = _mm256_and_si256(_mm256_castps_si256(x), exponent);
  return _mm256_movemask_epi8(_mm256_cmpeq_epi32(bits, exponent)) != 0;
}
MIXEDKV_INLINE bool any_not_finite_16(const f16_t *p) {
  const __m256i exponent = _mm256_set1_epi16(0x7c00);
  const __m256i bits =
      _mm256_and_si256(_mm256_loadu_si256(reinterpret_cast<const __m256i *>(p)), exponent);
  return _mm256_movemask_epi8(_mm256_cmpeq_epi16(bits, exponent)) != 0;
}

// --- Q4_0: nibble to float, then one FMA: n * d - 8 * d is (n - 8) * d exactly, since d has 11
// bits. -------------------------------------------------------------------------------------------

struct Q4 {
  const uint8_t *qs;
  __m256 d;
  __m256 minus_8d;
};
MIXEDKV_INLINE Q4 q4_open(const block_q4_0 *block) {
  const __m256 d = _mm256_broadcastss_ps(_mm_cvtph_ps(_mm_cvtsi32_si128(block->d)));
  return {block->qs, d, _mm256_mul_ps(d, _mm256_set1_ps(-8.0f))};
}
/// The nibbles, 0 to 15.
template <int V> MIXEDKV_INLINE f32v q4_nibbles(const Q4 &q4) {
  const __m256i bytes = _mm256_cvtepu8_epi32(
      _mm_loadl_epi64(reinterpret_cast<const __m128i *>(q4.qs + V % 2 * kLanes)));
  return _mm256_cvtepi32_ps(V < 2 ? _mm256_and_si256(bytes, _mm256_set1_epi32(15))
                                  : _mm256_srli_epi32(bytes, 4));
}
template <int V> MIXEDKV_INLINE f32v q4_vector(const Q4 &q4) {
  return _mm256_fmadd_ps(q4_nibbles<V>(q4), q4.d, q4.minus_8d);
}
template <int V> MIXEDKV_INLINE f32v q4_vector_exact(const Q4 &q4) {
  return _mm256_mul_ps(_mm256_sub_ps(q4_nibbles<V>(q4), _mm256_set1_ps(8.0f)), q4.d);
}

/// Sixteen levels are bytes of one register, which vpshufb looks up.
struct Levels {
  __m128i low, high;
  __m256 d;
};
MIXEDKV_INLINE Levels open_levels(const int8_t *levels, f16_t d, __m128i bytes) {
  const __m128i table = _mm_loadu_si128(reinterpret_cast<const __m128i *>(levels));
  const __m128i fifteen = _mm_set1_epi8(15);
  const __m128i high = _mm_and_si128(_mm_srli_epi16(bytes, 4), fifteen);
  return {_mm_shuffle_epi8(table, _mm_and_si128(bytes, fifteen)), _mm_shuffle_epi8(table, high),
          set1_half(d)};
}
template <int V> MIXEDKV_INLINE f32v level(const Levels &x) {
  const __m128i sixteen = V < 2 ? x.low : x.high;
  const __m128i eight = V % 2 ? _mm_unpackhi_epi64(sixteen, sixteen) : sixteen;
  return _mm256_mul_ps(_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(eight)), x.d);
}

/// Of 32 values: the bits of the largest as signed integers (negative where none has a clear sign
/// bit) and as unsigned ones (below 2^31 where none has a set one).
MIXEDKV_INLINE void find_extremes(const f32v *x, int32_t &largest_signed,
                                  uint32_t &largest_unsigned) {
  const __m256i a = _mm256_castps_si256(x[0]), b = _mm256_castps_si256(x[1]);
  const __m256i c = _mm256_castps_si256(x[2]), d = _mm256_castps_si256(x[3]);
  const __m256i s = _mm256_max_epi32(_mm256_max_epi32(a, b), _mm256_max_epi32(c, d));
  const __m256i u = _mm256_max_epu32(_mm256_max_epu32(a, b), _mm256_max_epu32(c, d));
  __m128i s4 = _mm_max_epi32(_mm256_castsi256_si128(s), _mm256_extracti128_si256(s, 1));
  __m128i u4 = _mm_max_epu32(_mm256_castsi256_si128(u), _mm256_extracti128_si256(u, 1));
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
constexpr int kQuantBlocks = 8;
struct LargestSigned {
  __m256i of_32(__m256i a, __m256i b) const { return _mm256_max_epi32(a, b); }
  __m256i of_16(__m256i a, __m256i b) const { return _mm256_max_epi16(a, b); }
};
struct LargestUnsigned {
  __m256i of_32(__m256i a, __m256i b) const { return _mm256_max_epu32(a, b); }
  __m256i of_16(__m256i a, __m256i b) const { return _mm256_max_epu16(a, b); }
};
MIXEDKV_INLINE __m256i load_8(const void *p) {
  return _mm256_loadu_si256(static_cast<const __m256i *>(p));
}
template <typename Op, typename F> MIXEDKV_INLINE f32v fold_blocks(Op op, F source, const float *) {
  __m256i fours[2];
  for (int i = 0; i < 2; ++i) {
    __m256i x[4];
    for (int j = 0; j < 4; ++j) {
      const float *p = source(4 * i + j);
      x[j] = op.of_32(op.of_32(load_8(p), load_8(p + 8)), op.of_32(load_8(p + 16), load_8(p + 24)));
    }
    const __m256i a =
        op.of_32(_mm256_unpacklo_epi32(x[0], x[1]), _mm256_unpackhi_epi32(x[0], x[1]));
    const __m256i b =
        op.of_32(_mm256_unpacklo_epi32(x[2], x[3]), _mm256_unpackhi_epi32(x[2], x[3]));
    fours[i] = op.of_32(_mm256_unpacklo_epi64(a, b), _mm256_unpackhi_epi64(a, b));
  }
  return _mm256_castsi256_ps(op.of_32(_mm256_permute2x128_si256(fours[0], fours[1], 0x20),
                                      _mm256_permute2x128_si256(fours[0], fours[1], 0x31)));
}
template <typename Op, typename F> MIXEDKV_INLINE f32v fold_blocks(Op op, F source, const f16_t *) {
  __m256i x[8];
  for (int j = 0; j < 8; ++j)
    x[j] = op.of_16(load_8(source(j)), load_8(source(j) + 16));
  for (int j = 0; j < 4; ++j)
    x[j] = op.of_16(_mm256_unpacklo_epi16(x[2 * j], x[2 * j + 1]),
                    _mm256_unpackhi_epi16(x[2 * j], x[2 * j + 1]));
  for (int j = 0; j < 2; ++j)
    x[j] = op.of_16(_mm256_unpacklo_epi32(x[2 * j], x[2 * j + 1]),
                    _mm256_unpackhi_epi32(x[2 * j], x[2 * j + 1]));
  const __m256i eight =
      op.of_16(_mm256_unpacklo_epi64(x[0], x[1]), _mm256_unpackhi_epi64(x[0], x[1]));
  const __m256i swapped = _mm256_permute2x128_si256(eight, eight, 0x01);
  return _mm256_cvtph_ps(_mm256_castsi256_si128(op.of_16(eight, swapped)));
}
template <typename T, typename F>
MIXEDKV_INLINE void find_group_extremes(F source, f32v (&top)[1], f32v (&bottom)[1]) {
  const T *type = nullptr;
  top[0] = fold_blocks(LargestSigned(), source, type);
  bottom[0] = fold_blocks(LargestUnsigned(), source, type);
}

/// 32 values y >= 0 become min(15, trunc(y)), packed.
MIXEDKV_INLINE void store_q4(uint8_t *qs, const f32v *y) {
  const __m256i fifteen = _mm256_set1_epi32(15);
  __m256i q[4];
  for (int i = 0; i < 4; ++i)
    q[i] = _mm256_min_epi32(_mm256_cvttps_epi32(y[i]), fifteen);
  const __m256i first = _mm256_or_si256(q[0], _mm256_slli_epi32(q[2], 4));
  const __m256i second = _mm256_or_si256(q[1], _mm256_slli_epi32(q[3], 4));
  // packs works within 128-bit halves: the middle quarters change places.
  const __m256i words = _mm256_permute4x64_epi64(_mm256_packs_epi32(first, second), 0xd8);
  const __m128i bytes =
      _mm_packus_epi16(_mm256_castsi256_si128(words), _mm256_extracti128_si256(words, 1));
  _mm_storeu_si128(reinterpret_cast<__m128i *>(qs), bytes);
}

MIXEDKV_INLINE f16_t to_half(float x) {
  return static_cast<f16_t>(
      _mm_cvtsi128_si32(_mm_cvtps_ph(_mm_set_ss(x), _MM_FROUND_TO_NEAREST_INT)));
}

// --- tiles: 16 registers hold at most 12 sums, 8 where blocks are unpacked beside them ---------

constexpr int kRows = 4;
constexpr int kOpenKeys = 1;
constexpr int key_tile(int rows, bool q4) { return rows == 1 ? 8 : rows < 4 ? 4 : q4 ? 2 : 3; }
constexpr int value_tile(int rows, bool q4) {
  return rows == 1 ? 8 : rows == 2 || (rows == 3 && !q4) ? 4 : 2;
}

MIXEDKV_INLINE void transpose(f32v (&x)[8]) {
  f32v y[8];
  for (int i = 0; i < 8; i += 4) { // 4 x 4 in either half
    const f32v a = _mm256_unpacklo_ps(x[i], x[i + 1]), b = _mm256_unpackhi_ps(x[i], x[i + 1]);
    const f32v c = _mm256_unpacklo_ps(x[i + 2], x[i + 3]);
    const f32v d = _mm256_unpackhi_ps(x[i + 2], x[i + 3]);
    y[i] = _mm256_shuffle_ps(a, c, 0x44);
    y[i + 1] = _mm256_shuffle_ps(a, c, 0xee);
    y[i + 2] = _mm256_shuffle_ps(b, d, 0x44);
    y[i + 3] = _mm256_shuffle_ps(b, d, 0xee);
  }
  for (int i = 0; i < 4; ++i) {
    x[i] = _mm256_permute2f128_ps(y[i], y[i + 4], 0x20);
    x[i + 4] = _mm256_permute2f128_ps(y[i], y[i + 4], 0x31);
  }
}
