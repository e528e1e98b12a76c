// Many query rows against keys that lie side by side, [head_dim][kPackedTokens] f32 a tile: the
// inner loop of a matrix product, R rows by C vectors of tokens, without a sum across a vector.
// Bringing keys into that form costs a transposition, which some eight rows pay for.

/// Tiles that sums are held of beside kRows rows.
constexpr int kTransposedTiles = kLanes == 16 ? 4 : 1;

template <int R, int T>
MIXEDKV_INLINE void transposed_scores(const float *q, size_t ld_q, const float *kt, int head_dim,
                                      float *scores, size_t ld_scores) {
  constexpr int C = T * kTileVectors;
  const float *tiles[T];
  for (int t = 0; t < T; ++t)
    tiles[t] = kt + static_cast<size_t>(t) * static_cast<size_t>(head_dim) * kPackedTokens;
  f32v sum[R][C];
  for (int r = 0; r < R; ++r)
    for (int c = 0; c < C; ++c)
      sum[r][c] = zero();
  for (int i = 0; i < head_dim; ++i) {
    f32v k[C];
    for (int c = 0; c < C; ++c)
      k[c] = load(tiles[c / kTileVectors] + i * kPackedTokens + c % kTileVectors * kLanes);
    for (int r = 0; r < R; ++r) {
      const f32v x = set1(q[at(r, ld_q, i)]);
      for (int c = 0; c < C; ++c)
        sum[r][c] = fma(x, k[c], sum[r][c]);
    }
  }
  for (int r = 0; r < R; ++r)
    for (int c = 0; c < C; ++c)
      store(scores + at(r, ld_scores, c * kLanes), sum[r][c]);
}

template <int R = kRows>
MIXEDKV_INLINE void qk_transposed_rows(int num_rows, const float *q, size_t ld_q, const float *kt,
                                       int num_tiles, int head_dim, float *scores,
                                       size_t ld_scores) {
  if constexpr (R > 1)
    if (num_rows < R)
      return qk_transposed_rows<R - 1>(num_rows, q, ld_q, kt, num_tiles, head_dim, scores,
                                       ld_scores);
  const size_t tile = static_cast<size_t>(head_dim) * kPackedTokens;
  int t = 0;
  for (; t + kTransposedTiles <= num_tiles; t += kTransposedTiles)
    transposed_scores<R, kTransposedTiles>(q, ld_q, kt + static_cast<size_t>(t) * tile, head_dim,
                                           scores + t * kPackedTokens, ld_scores);
  for (; t < num_tiles; ++t)
    transposed_scores<R, 1>(q, ld_q, kt + static_cast<size_t>(t) * tile, head_dim,
                            scores + t * kPackedTokens, ld_scores);
}

void qk_transposed(const float *q, size_t ld_q, int num_rows, const float *kt, int num_tiles,
                   int head_dim, float *scores, size_t ld_scores) noexcept {
  if (num_rows == 0)
    return;
  const int step = rows_of_group(num_rows);
  for (int r = 0; r < num_rows; r += step)
    qk_transposed_rows<>(num_rows - r < step ? num_rows - r : step, q + at(r, ld_q, 0), ld_q, kt,
                         num_tiles, head_dim, scores + at(r, ld_scores, 0), ld_scores);
}

MIXEDKV_INLINE void unpack_row(const f16_t *x, float *y, int n) {
  f16_to_f32(x, y, static_cast<size_t>(n));
}
MIXEDKV_INLINE void unpack_row(const float *x, float *y, int n) {
  memcpy(y, x, static_cast<size_t>(n) * sizeof(float));
}

/// Where dim `begin` of a row of T starts, counted in T.
MIXEDKV_INLINE const block_q4_0 *from_dim(const block_q4_0 *row, int begin) {
  return row + begin / QK4_0;
}
template <typename T> MIXEDKV_INLINE const T *from_dim(const T *row, int begin) {
  return row + begin;
}

template <typename T>
void transpose_keys(const Rows *k, int num_keys, int head_dim, float *kt) noexcept {
  // A stretch of dims at a time, whose f32 rows fit on the stack whatever head_dim is.
  constexpr int kStretch = 128;
  alignas(64) float rows[kPackedTokens][kStretch];
  for (int begin = 0; begin < head_dim; begin += kStretch) {
    const int n = head_dim - begin < kStretch ? head_dim - begin : kStretch;
    for (int j = 0; j < kPackedTokens; ++j) {
      if (j < num_keys)
        unpack_row(from_dim(row_at<T>(*k, j), begin), rows[j], n);
      else
        memset(rows[j], 0, sizeof rows[j]);
    }
    float *out = kt + begin * kPackedTokens;
    int i = 0;
    for (; i + kLanes <= n; i += kLanes)
      for (int j = 0; j < kPackedTokens; j += kLanes) {
        f32v x[kLanes];
        for (int l = 0; l < kLanes; ++l)
          x[l] = load(rows[j + l] + i);
        transpose(x);
        for (int l = 0; l < kLanes; ++l)
          store(out + (i + l) * kPackedTokens + j, x[l]);
      }
    for (; i < n; ++i)
      for (int j = 0; j < kPackedTokens; ++j)
        out[i * kPackedTokens + j] = rows[j][i];
  }
}

// --- packed Q4_0 as f32 ------------------------------------------------------------------------

template <int K> MIXEDKV_INLINE f32v signed_nibble(i32v x) {
  return to_f32(shift_right_signed<28>(shift_left<28 - 4 * K>(x)));
}

template <int K> MIXEDKV_INLINE void unpack_key_nibbles(i32v x, f32v d, float *dims) {
  constexpr int dim = K / 2 + K % 2 * (QK4_0 / 2);
  store(dims + dim * kPackedTokens, mul(signed_nibble<K>(x), d));
  if constexpr (K < 7)
    unpack_key_nibbles<K + 1>(x, d, dims);
}

void unpack_packed_keys(const void *tile, int head_dim, float *kt) noexcept {
  const uint8_t *bytes = static_cast<const uint8_t *>(tile);
  const int num_blocks = head_dim / QK4_0;
  const i32v flip = set1_i32(static_cast<int32_t>(0x88888888));
  for (int b = 0; b < num_blocks; ++b)
    for (int token = 0; token < kPackedTokens; token += kLanes) {
      const f32v d = load(packed_scale(bytes, num_blocks, b, token));
      for (int w = 0; w < 4; ++w) {
        const i32v x = load_i32(bytes + b * kPackedBlockBytes + (w * kPackedTokens + token) * 4);
        unpack_key_nibbles<0>(xor_i32(x, flip), d,
                              kt + (b * QK4_0 + w * 4) * kPackedTokens + token);
      }
    }
}

template <int K>
MIXEDKV_INLINE void unpack_value_nibbles(i32v x, const float *d, float *values, size_t ld) {
  constexpr int token = K % 4 * 2 + K / 4;
  store(values + static_cast<size_t>(token) * ld, mul(signed_nibble<K>(x), set1(d[token])));
  if constexpr (K < 7)
    unpack_value_nibbles<K + 1>(x, d, values, ld);
}

void unpack_packed_values(const void *tile, int head_dim_v, float *values) noexcept {
  const uint8_t *bytes = static_cast<const uint8_t *>(tile);
  const int num_blocks = head_dim_v / QK4_0;
  const size_t ld = static_cast<size_t>(head_dim_v);
  for (int b = 0; b < num_blocks; ++b) {
    float d[kPackedTokens];
    f16_to_f32(packed_scale(bytes, num_blocks, b, 0), d, kPackedTokens);
    for (int g = 0; g < 2; ++g)
      for (int i = b * QK4_0; i < (b + 1) * QK4_0; i += kLanes)
        unpack_value_nibbles<0>(load_i32(bytes + (g * head_dim_v + i) * 4), d + g * 8,
                                values + static_cast<size_t>(g) * 8 * ld + i, ld);
  }
}
